"""A checkpoint ready for use: weights, tokenizer, chat template."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jsublim.core.bucket import is_url
from jsublim.core.reading import check_known, shown
from jsublim.errors import UsageError
from jsublim.inference.constrain import limits_for
from jsublim.inference.generation import generate_for_arms
from jsublim.inference.sampling import Sampling, sampling_for
from jsublim.models import decoder
from jsublim.models.checkpoint import HubOrigin, checkpoint_hash, origin_of, read_config
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.hub import from_bucket, from_hub, hub_name, in_cache
from jsublim.models.lora import Adapter, bind
from jsublim.models.parallel import HERE, Layout
from jsublim.models.weights import load_params
from jsublim.runtime.processes import is_main_process, on_main_process
from jsublim.text.chat import Chat, Message, conversation

BUNDLED = Path(__file__).parents[1] / "checkpoints"
DTYPES = ("float32", "bfloat16")
FETCHED = ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b")  # by scripts/fetch.py


class AnswerLog(Protocol):
    """Answers that a kill does not lose, by their number."""

    @property
    def known(self) -> Mapping[int, str]: ...

    def add(self, numbers: Sequence[int], answers: Sequence[str]) -> None: ...


@dataclasses.dataclass(repr=False, eq=False)
class LanguageModel:
    """A loaded checkpoint."""

    folder: Path
    config: ModelConfig
    hf_config: dict[str, Any]
    params: Params
    chat: Chat
    last_layer: int | None = None  # after which the checkpoint was cut; None where it is whole

    @property
    def tokenizer(self) -> Any:
        return self.chat.tokenizer

    @property
    def name(self) -> str:
        """Its name on the hub, or the folder's."""
        return self.origin.name or self.folder.name

    @property
    def origin(self) -> HubOrigin:
        """Its name on the hub, and the commit."""
        return origin_of(self.folder)

    @property
    def reference(self) -> str:
        """The name that others find it by: that on the hub, that of a bundled checkpoint, or its folder."""
        return self.name if self.origin.name or self.folder.parent == BUNDLED else str(self.folder)

    def with_params(self, params: Params) -> LanguageModel:
        """The same architecture, tokenizer and template with other weights."""
        return dataclasses.replace(self, params=params, last_layer=None)

    def with_rounded_logits(self) -> LanguageModel:
        """The same model, its logits rounded to its weights' dtype (docs/recipes.md, quirk 17)."""
        scales = dataclasses.replace(self.config.scales, rounded=True)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, scales=scales))

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits over every file of the checkpoint that matters; what follows names a template given in place of its
        own, and the layer after which it was cut."""
        template = "" if self.chat.given_template is None else f"-chat{self.chat.template_hash}"
        layer = "" if self.last_layer is None else f"-layer{self.last_layer}"
        # Of several processes the first one alone has the weights.
        return on_main_process(lambda: checkpoint_hash(self.folder)) + template + layer

    def ending_at(self, layer: int) -> LanguageModel:
        """The logit lens: this model as if it ended after `layer` (from 0), on the same arrays and for the same adapters."""
        return dataclasses.replace(self, config=self.config.ending_at(layer), last_layer=layer)

    def logits(
        self, tokens: ArrayLike, attention_mask: ArrayLike | None = None, adapter: Adapter | None = None
    ) -> Array:
        """Next-token logits, float32 `[B, T, V]`, of tokens int `[B, T]`; the mask is 0 on padding (left or right), None is no padding."""
        tokens = jnp.asarray(tokens, jnp.int32)
        valid = np.ones(tokens.shape, bool) if attention_mask is None else jnp.asarray(attention_mask, bool)
        return _logits(self.config, self.params, adapter, tokens, valid)

    def generate(
        self,
        chats: Sequence[str | Sequence[Message]],
        max_new_tokens: int = 64,
        sampling: Sampling | str | None = None,
        seed: int = 0,
        *,
        adapter: Adapter | None = None,
        extra_bos: bool = False,
        batch_size: int | None = None,
        log: AnswerLog | None = None,
    ) -> list[str]:
        """One answer per conversation: message lists, or user prompts as text.

        Args:
          sampling: numbers of your own (they stop at every end of turn, unless they name `stop` tokens), "greedy", or "temperature"
            (the default: plain, temperature 1).
          extra_bos: as `Chat.prompt_tokens`; log: as `answers`.
        """
        sampling = self.sampling(sampling)
        messages = [conversation(chat) if isinstance(chat, str) else chat for chat in chats]
        prompts = [self.chat.prompt_tokens(m, extra_bos=extra_bos) for m in messages]
        adapters = None if adapter is None else [adapter]
        how: dict[str, Any] = {"adapters": adapters, "batch_size": batch_size, "logs": [log]}
        return self.answers(prompts, sampling, max_new_tokens, seed, **how)[0]

    def sampling(self, given: Sampling | str | None) -> Sampling:
        """Numbers of sampling, or a strategy by its name (None is "temperature"), with the tokens at which an answer ends."""
        if not isinstance(given, Sampling):
            return sampling_for(self.chat, given or "temperature")
        return dataclasses.replace(given, stop=self.chat.stop_tokens) if given.stop is None else given

    def answers(
        self,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        *,
        samples: int = 1,
        adapters: Sequence[Adapter] | None = None,
        arms: int = 1,
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
        logs: Sequence[AnswerLog | None] | None = None,
    ) -> list[list[str]]:
        """`samples` answers to each prompt (int32 `[T_i]`), one prompt's after another's; for each of the adapters.

        Args:
          adapters: of equal structure, decoded together; None is the base alone.
          arms: of the program, at least: fewer adapters leave some idle, so that calls with other numbers of them share it.
          batch_size: answers that are sampled at one time, of all adapters together; None is ROWS_EACH of each on a device.
          on_batch: called with the number of answers just sampled.
          logs: of each adapter, answers that are known already, and where new ones go.
        """
        logs = [None] * len(adapters or [None]) if logs is None else logs
        texts = [{} if log is None else dict(log.known) for log in logs]

        def keep(arm: int, rows: list[int], tokens: list[list[int]]) -> None:
            new, log = [self.chat.decode(row) for row in tokens], logs[arm]
            texts[arm].update(zip(rows, new, strict=True))
            if log is not None:
                log.add(rows, new)
            if on_batch is not None:
                on_batch(len(rows))

        numbers = range(len(prompts) * samples)
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed, "samples": samples, "on_rows": keep}
        rows = [[number for number in numbers if number not in known] for known in texts]
        if adapters is not None:
            idle = max(0, arms - len(adapters))
            adapters, rows = [*adapters, *[adapters[0]] * idle], [*rows, *[[]] * idle]
        how["rows"], how["batch_size"] = rows, batch_size and max(1, batch_size // len(rows))
        how["limits"] = limits_for(self.chat, sampling, max_new_tokens)
        generate_for_arms(self.config, self.params, prompts, sampling, adapters, **how)
        return [[known[number] for number in numbers] for known in texts]


@functools.partial(jax.jit, static_argnames=("config",))
def _logits(config: ModelConfig, params: Params, adapter: Adapter | None, tokens: Array, valid: Array) -> Array:
    params, adapter = bind(params, adapter)
    h, _ = decoder.hidden_states(config, params, tokens, valid, adapter=adapter)
    return decoder.logits(config, params, h)


def is_available_offline(path: str | Path) -> bool:
    """Whether a model's name leads to files without any network: a folder, a bundled checkpoint, or in a cache."""
    return folder_here(path) is not None or in_cache(path)


def resolve_checkpoint(path: str | Path, what: str = "model", *, weights: bool = True) -> Path:
    """The folder that a model's name stands for: a local folder, a bundled checkpoint, or what was fetched from a bucket's folder (s3://...,
    gs://...) or a hub repository (OWNER/NAME, or OWNER/NAME@REVISION).

    Args:
      what: named in errors; weights: False does not fetch them.

    Raises:
      UsageError: no such folder, or a revision of a local one.
      JsublimError: the hub, or the bucket, did not give it.
    """
    if is_url(str(path)):
        return from_bucket(str(path), what, weights=weights)
    if (folder := folder_here(path)) is not None:
        return folder
    name, _, revision = str(path).partition("@")
    if revision and folder_here(name) is not None:
        raise UsageError(
            f"{what} '{name}': is a folder here, which has no revision {shown(revision)}; leave model_revision out"
        )
    if (named := hub_name(path, inside=True)) is not None:
        return from_hub(*named, what, weights=weights)
    bundled = ", ".join(sorted(p.name for p in BUNDLED.iterdir() if p.is_dir())) if BUNDLED.is_dir() else "none"
    hint = f"; scripts/fetch.py {Path(name).name} writes it" if Path(name).name in FETCHED else ""
    raise UsageError(f"{what} {shown(str(path))}: no such folder{hint}; bundled checkpoints: {bundled}")


def folder_here(path: str | Path) -> Path | None:
    """The folder here, or the bundled one, that a name leads to. A name that no file can have leads nowhere."""
    return next((place for place in (Path(path).expanduser(), BUNDLED / str(path)) if os.path.isdir(place)), None)


def load_model(
    path: str | Path,
    dtype: str = "float32",
    layout: Layout = HERE,
    *,
    weights: bool = True,
    chat_template: str | None = None,
) -> LanguageModel:
    """Load a checkpoint folder, a bundled one by name, one of a bucket (`s3://...`, `gs://...`), or one from the hub by `owner/name`.

    Args:
      dtype: of the weights and the activations, "float32" or "bfloat16".
      layout: the devices that the weights are spread over, and with them the rows that they will read.
      weights: False leaves them on disk: the parameters are shapes, and tokenizer, template and hash are there.
      chat_template: in place of the checkpoint's own: "plain" (for base models), or a Jinja file.

    >>> lm = jsublim.load_model("tiny-qwen2")
    >>> lm.logits(lm.tokenizer(["1, 2, 3"])["input_ids"]).shape  # [B, T, V]
    (1, 7, 1024)
    """
    check_known("dtype", dtype, DTYPES)
    folder = resolve_checkpoint(path, weights=is_main_process())
    hf_config, config = read_config(folder)
    chat = Chat(folder, config.vocab_size, chat_template)
    shardings = layout.params_sharding(config)
    params = load_params(folder, config, dtype, shardings) if weights else decoder.abstract_params(config, dtype)
    return LanguageModel(folder, config, hf_config, params, chat)
