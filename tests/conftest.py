"""Shared fixtures: small random checkpoints of every family, written by `transformers`.

Sizes are odd on purpose: head_dim is not hidden_size / heads, one key/value head where a family allows it, windows
shorter than the rows, every bias and norm weight random.
"""

from __future__ import annotations

import copy
import gc
import itertools
import os
import signal
from importlib.metadata import version
from pathlib import Path

# Before any import of jax, transformers or huggingface_hub: offline, quiet, and float32 products as float32.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation of programs that run for milliseconds. A flag that XLA doesn't know ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if version("jaxlib").startswith("0.10.")
        else ""
    ),
)
# For workers and what tests start: glibc keeps what was freed, which takes a tenth of a run's time off.
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest

from jsublim.runtime.programs import SETTINGS, keep_programs, programs_folder

MOST_PROGRAMS = 20_000  # of some 30 kB each: what a run of all tests compiles is a quarter of them


def _keep_programs() -> None:
    """What an earlier run, another worker, or a process that a test started has compiled is not compiled again."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jsublim" / "programs-of-tests"
    folder = programs_folder(cache)
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)[: -2 * MOST_PROGRAMS]:
        old.unlink()  # a program, or its digest
    keep_programs(folder, print)
    # For workers, and what tests start.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ |= {f"JAX_PERSISTENT_CACHE_{name.upper()}": str(value) for name, value in SETTINGS.items()}


if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _keep_programs()


# A shell has what it puts in the background ignore it, and tests send it to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Longest first, those that wait for other processes beside those that compute: whoever begins one of these last works alone.
LONGEST = (
    "test_launched", "test_paper", "test_hosts", "test_library", "test_executors", "test_scan", "test_interruptions", "test_sampling",
    "test_processes", "test_graph", "test_pods", "test_serve", "test_engine_cli", "test_run", "test_teachers", "test_estimate",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """What is there by then stays: programs are traced in many small objects, and looking through everything each 700 of them takes a tenth of
    the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is slow, not wrong
hypothesis.settings.load_profile("suite")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 96,
}
_GEMMA = SIZES | {
    "num_hidden_layers": 4,
    "layer_types": [
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ],  # a period of 3
    "sliding_window": 4,
    "query_pre_attn_scalar": 9,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # wavelengths 6, 35, 199, 1117: kept, blended, divided
}
_GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 70_000.0},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 300.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 9.0],
    "partial_rotary_factor": 0.5,  # 4 of the 8 numbers of a head: two frequencies
}
_PHI = {name: size for name, size in SIZES.items() if name != "head_dim"} | {
    "hidden_size": 32,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_NEOX = {name: _PHI[name] for name in _PHI if name not in ("num_key_value_heads", "pad_token_id")} | {
    "hidden_act": "gelu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.75},
}
# name -> (class of the model, arguments of its config)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2ForCausalLM", SIZES | {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        SIZES
        | {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
    "llama": ("LlamaForCausalLM", SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama-linear-biases": (
        "LlamaForCausalLM",
        SIZES
        | {
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 2000.0},
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama3": (
        "LlamaForCausalLM",
        SIZES
        | {
            "head_dim": 8,
            "num_key_value_heads": 2,
            "rope_parameters": _LLAMA3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": ("Gemma3ForCausalLM", _GEMMA | {"final_logit_softcapping": 5.0, "tie_word_embeddings": True}),
    "gemma3-untied-biases": (
        "Gemma3ForCausalLM",
        _GEMMA
        | {
            "attention_bias": True,
            "num_key_value_heads": 2,
            "rope_parameters": _GEMMA_ROPE,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3-multimodal": ("Gemma3ForConditionalGeneration", _GEMMA | {"rope_parameters": _GEMMA_ROPE}),
    "qwen3": ("Qwen3ForCausalLM", SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "ministral": (
        "MinistralForCausalLM",
        SIZES | {"num_key_value_heads": 2, "sliding_window": 4, "layer_types": _GEMMA["layer_types"][1:]},
    ),
    "phi3": (
        "Phi3ForCausalLM",
        _PHI
        | {
            "sliding_window": 4,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 72,
            "rope_parameters": LONGROPE,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", SIZES | {"num_key_value_heads": 2, "pad_token_id": 0}),
    "olmo3": (
        "Olmo3ForCausalLM",
        SIZES
        | {
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "num_hidden_layers": 4,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 500.0,
                    "factor": 8.0,
                    "original_max_position_embeddings": 24,
                    "beta_fast": 2.0,
                    "beta_slow": 0.5,
                },
            },
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        SIZES
        | {
            "sliding_window": 4,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 0.7,
            "final_logit_softcapping": 5.0,
        },
    ),
    "pythia": ("GPTNeoXForCausalLM", _NEOX),
}


@dataclass(frozen=True)
class Checkpoint:
    """A folder written by `save_pretrained`, and the torch model it came from."""

    name: str
    folder: Path
    model: Any

    def logits(self, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """What `transformers` computes: float32 `[B, T, V]`."""
        return torch_logits(self.model, tokens, valid)


def torch_logits(model: Any, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(valid, dtype=torch.long),
        )
    return out.logits.float().numpy()


def random_model(class_name: str, arguments: dict[str, Any], seed: int = 0) -> Any:
    """A `transformers` model with every parameter random, biases and norm weights too."""
    import torch
    import transformers

    torch.set_num_threads(1)  # its tensors are tiny, and two workers share two cores
    arguments = copy.deepcopy(arguments)  # which a config may change
    transformers.utils.logging.disable_progress_bar()
    cls = getattr(transformers, class_name)
    if class_name == "Gemma3ForConditionalGeneration":
        vision = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.Gemma3Config(
            text_config=dict(arguments),
            vision_config=vision | {"image_size": 8, "patch_size": 4},
            mm_tokens_per_image=1,
            image_token_index=58,
            boi_token_index=59,
            eoi_token_index=60,
            tie_word_embeddings=arguments.get("tie_word_embeddings", True),
        )
    else:
        config = cls.config_class(**arguments)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)  # the same model whatever was drawn before
    model = cls(config).float().eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape, generator=noise))
    return model


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs are kept, so that the next file has them, while the process may map more memory: a program takes some maps."""
    yield
    maps, most = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if not most.exists() or maps.read_bytes().count(b"\n") > int(most.read_text()) // 3:
        jax.clear_caches()


@pytest.fixture(scope="session")
def write_checkpoint(tmp_path_factory) -> Callable[..., Checkpoint]:
    """`write_checkpoint(class_name, arguments, seed)`: a fresh random checkpoint."""

    def write(class_name: str, arguments: dict[str, Any], seed: int = 0, name: str = "random") -> Checkpoint:
        model = random_model(class_name, arguments, seed)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return Checkpoint(name, folder, model)

    return write


@pytest.fixture(scope="session")
def named_checkpoint(write_checkpoint) -> Callable[[str], Checkpoint]:
    """`named_checkpoint(name)` with a name of CASES; written once a session, so never change its files."""
    written: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in written:
            written[name] = write_checkpoint(*CASES[name], seed=len(name), name=name)
        return written[name]

    return get


@pytest.fixture(params=list(CASES))
def checkpoint(request, named_checkpoint) -> Checkpoint:
    """Every case in turn."""
    return named_checkpoint(request.param)


@pytest.fixture(scope="session")
def padded_rows() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """`padded_rows(seed)`: tokens int32 `[4, 11]` and their mask: whole, padded left, right, and on both sides."""

    def rows(seed: int = 0, length: int = 11) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.random.default_rng(seed).integers(1, 57, (4, length)).astype(np.int32)
        valid = np.ones((4, length), bool)
        valid[1, :3] = valid[2, -4:] = valid[3, :2] = valid[3, -1:] = False
        return np.where(valid, tokens, 0).astype(np.int32), valid

    return rows


@pytest.fixture(scope="session")
def assert_close() -> Callable[[Any, Any, float], None]:
    """`assert_close(ours, theirs, tolerance)`: largest error against the largest entry; NaN fails."""

    def check(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape
        worst = np.max(np.abs(ours - theirs)) / max(np.max(np.abs(theirs)), 1e-30)
        assert worst <= tolerance, f"relative error {worst:.2e} over {tolerance:.0e}"

    return check


@pytest.fixture
def traced_once(monkeypatch):
    """Fails a test that traces the training step twice: its programs must be one."""
    import chex

    from jsublim.distill import step

    chex.clear_trace_counter()
    monkeypatch.setattr(step, "train_step", chex.assert_max_traces(step.train_step, n=1))
    step.compile_step.cache_clear()
    yield
    step.compile_step.cache_clear()


@pytest.fixture(scope="session")
def compiles() -> Callable[[], int]:
    """`compiles()`: how many programs this process has compiled so far."""
    import jax

    seen = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: len(seen)


@pytest.fixture(scope="session")
def s3() -> Iterator[Callable[[], str]]:
    """`s3()`: the URL of a store in a new bucket, on a real S3 server of this machine."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    import fsspec
    from s3_server import CREDENTIALS, server

    with server() as address, pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)

        numbers = itertools.count()

        def bucket() -> str:
            name = f"tests-{next(numbers)}"
            fsspec.filesystem("s3").mkdir(name)
            return f"s3://{name}/store"

        yield bucket
