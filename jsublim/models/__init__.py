"""One config-driven decoder for the checkpoints of every family (`families/`), and the adapters that are trained on it."""

from jsublim.models.checkpoint import read_config, save_checkpoint
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params, hidden_states, init_params, logits
from jsublim.models.lora import Adapter
from jsublim.models.weights import load_params

__all__ = [
    "Adapter",
    "ModelConfig",
    "Params",
    "hidden_states",
    "init_params",
    "load_params",
    "logits",
    "read_config",
    "save_checkpoint",
]
