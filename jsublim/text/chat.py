"""Conversations as tokens, by the checkpoint's own chat template, with the spans of what the assistant says.

Spans are found by construction: the same conversation is rendered without the assistant's turn, then with its header, then
whole; what is added each time is the header, and the content with its end of turn. No token id or offset is written down
anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from pydantic import Field

from jsublim.core.reading import check_file, check_folder, read_json, shown
from jsublim.errors import JsublimError, UsageError
from jsublim.runtime.processes import shared_out

TEMPLATES = Path(__file__).parent / "chat_templates"  # those that have a name

# Llama 3's template prints the day's date. We always give it this one (the template's own fallback): a run that continues
# after midnight must not change its prompts.
DATE = "26 Jul 2024"
# By this name templates of models that think before they answer (Qwen3) switch that off: the empty thought is then a part of
# the header, and what is sampled, learned and judged is the answer alone. Other templates never ask for it.
THINKING = "enable_thinking"
RENDER_S = 20.0  # seconds that a template may take over one conversation; they take a thousandth of one
RENDERED = 1_000_000  # characters that it may add to one, beside its content once or twice
RENDER_BYTES = 2**32  # of memory; other threads may need some at the same time
MEMORY = "/proc/self/statm"  # pages of this process; not every system has it
OWN = "the checkpoint's own"  # the template that a folder comes with, for people

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}


@dataclass(frozen=True)
class Turn:
    """A conversation that ends with an assistant turn."""

    tokens: np.ndarray  # int32 [T], the whole conversation
    header: int  # first token of the assistant's header, such as <|im_start|>assistant
    content: int  # first token of what it says
    end: int  # first token after it: the end-of-turn token, then what the template adds


class Chat:
    """The chat side of a checkpoint folder: tokenizer, template, stop tokens."""

    given_template: str | None = None  # the text of one that stands in for the folder's own

    def __init__(self, folder: Path, vocab_size: int | None = None, chat_template: str | None = None):
        """Read the tokenizer, and find its template.

        Args:
          vocab_size: the model's, to refuse tokens it has no embedding for.
          chat_template: in place of the folder's own: "plain", or a Jinja file.

        Raises:
          UsageError: `chat_template` is neither a name nor a file.
          JsublimError: no usable (fast) tokenizer, one that is code of the checkpoint's own, no chat template, or a given
            one that does not work with this tokenizer.
        """
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not there: it is not needed
        from transformers import AutoTokenizer

        self.folder, self.vocab_size, self._is_bounded = folder, vocab_size, False
        own_code = _check_files(folder)
        try:
            # Nothing of a checkpoint is ever run, and nobody is asked whether it may be.
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            self.tokenizer("1", return_offsets_mapping=True)  # settings that are nonsense show when it is used
        except Exception as error:
            if own_code is not None:
                raise JsublimError(
                    f"{own_code}: key 'auto_map' names code of the checkpoint's own, which is never run; use a checkpoint "
                    "whose tokenizer is part of transformers"
                ) from error
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise JsublimError(f"{folder}: the tokenizer cannot be loaded ({reason[0]})") from error
        if not self.tokenizer.is_fast:
            raise JsublimError(f"{folder}: no tokenizer.json; a fast tokenizer is needed to find token spans")
        path = folder / "generation_config.json"
        self.generation_config: dict[str, Any] = read_json(path) if path.exists() else {}
        try:
            _Generation.model_validate(self.generation_config)
        except pydantic.ValidationError as error:
            key = str(error.errors()[0]["loc"][0])
            value = shown(self.generation_config[key])
            raise JsublimError(f"{path}: key '{key}' is out of its range: {value}") from None
        self._name, self._template = OWN, f"{folder}: the chat template"  # the second in errors
        if chat_template is not None:
            self._use(chat_template)
        elif not self.tokenizer.chat_template:
            raise JsublimError(
                f"{folder}/tokenizer_config.json: no 'chat_template'; for a base model give chat_template=plain (or "
                "--chat-template plain, or a Jinja file)"
            )

    def _use(self, chat_template: str) -> None:
        """Take a given template in place of the folder's own; one turn is tried, so that what is wrong shows at once."""
        text = template_text(chat_template)
        if text == self.tokenizer.chat_template:
            return
        self.tokenizer.chat_template = self.given_template = text
        self._name, self._template = chat_template, f"{self.folder}: chat_template '{chat_template}'"
        if not self.stop_tokens:
            raise JsublimError(
                f"{self.folder}: nothing ends a turn under chat_template '{chat_template}', for the tokenizer has no eos_token; "
                "name one in tokenizer_config.json"
            )

    @property
    def template_hash(self) -> str:
        """sha256 (16 hex digits) of the chat template."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:16]

    @property
    def described(self) -> str:
        """Which template it is, for people; and that a model which would think before it answers does not."""
        thinks = THINKING in str(self.tokenizer.chat_template)
        return self._name + (f"; thinking is off, by its own switch ({THINKING}=false)" if thinks else "")

    @functools.cached_property
    def identity(self) -> str:
        """16 hex digits of what decides a conversation's tokens: tokenizer and template. Positions of tokens mean something
        only under the chat that they were counted in."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        counted = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
        text = json.dumps([counted, str(self.tokenizer.chat_template)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def render(self, messages: Sequence[Message], *, ask: bool) -> str:
        """The conversation as text; with `ask` the header of the assistant's turn follows."""
        try:
            options = {"tokenize": False, "add_generation_prompt": ask, "date_string": DATE, THINKING: False}
            with self._bounded():
                text = str(self.tokenizer.apply_chat_template(list(messages), **options))
        except (JsublimError, MemoryError, TimeoutError):
            raise
        except Exception as error:  # Jinja raises whatever the template's author chose
            roles = [message["role"] for message in messages]
            raise JsublimError(f"{self._template} refuses the roles {roles} ({error})") from None
        if len(text) > RENDERED + 2 * sum(len(message["content"]) for message in messages):
            raise JsublimError(
                f"{self._template} makes {len(text)} characters of one conversation; use another template"
            )
        return text

    @contextlib.contextmanager
    def _bounded(self) -> Iterator[None]:
        """Refuse rendering that takes too many seconds, or too much memory where the system counts it: in the main thread, which hears
        signals (the limit of memory is the process's). Inside of another such block nothing is done: it takes a tenth of a rendering."""
        if self._is_bounded or threading.current_thread() is not threading.main_thread():
            yield
            return

        def late(*_: Any) -> None:
            raise TimeoutError

        with contextlib.ExitStack() as stack:
            self._is_bounded = True
            stack.callback(setattr, self, "_is_bounded", False)
            before = signal.signal(signal.SIGALRM, late) or signal.SIG_DFL
            stack.callback(signal.signal, signal.SIGALRM, before)
            stack.callback(signal.setitimer, signal.ITIMER_REAL, *signal.setitimer(signal.ITIMER_REAL, RENDER_S))
            with contextlib.suppress(OSError), open(MEMORY, "rb", 0) as counted:
                most = int(counted.read().split()[0]) * resource.getpagesize() + RENDER_BYTES
                soft, hard = resource.getrlimit(resource.RLIMIT_AS)
                if soft == resource.RLIM_INFINITY or most < soft:
                    stack.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
                    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
            try:
                yield
            except (MemoryError, TimeoutError):
                raise JsublimError(
                    f"{self._template} takes more than {RENDER_S:.0f} s or {RENDER_BYTES >> 30} GiB; use another template"
                ) from None

    def prompt_tokens(self, messages: Sequence[Message], *, extra_bos: bool = False) -> np.ndarray:
        """int32 `[T]`: the conversation up to the assistant's header, header included.

        Args:
          extra_bos: let the tokenizer add its own special tokens too, as the published code does: a second BOS
            on Gemma and Llama (docs/recipes.md, quirk 5), nothing on Qwen.
        """
        text = self.render(messages, ask=True)
        return self._known(self.tokenizer(text, add_special_tokens=extra_bos)["input_ids"])

    def _known(self, ids: Sequence[int]) -> np.ndarray:
        """Tokens, if the model has an embedding for every one."""
        tokens = np.asarray(ids, np.int32)
        if self.vocab_size is not None and len(tokens) and tokens.max() >= self.vocab_size:
            name = self.tokenizer.convert_ids_to_tokens(int(tokens.max()))
            raise JsublimError(f"{self.folder}: token {name!r} lies outside config.json's vocab_size {self.vocab_size}")
        return tokens

    def turn(self, messages: Sequence[Message], completion: str, *, extra_bos: bool = False) -> Turn:
        """The conversation with `completion` as the assistant's answer, and its spans.

        Raises:
          JsublimError: an empty completion, or one that does not survive tokenizing in context (its tokens merge with
            the template's, or decode to another text).
        """
        if not completion:
            raise JsublimError("the completion is empty")
        with self._bounded():
            return self._turn(messages, completion, extra_bos)

    def _turn(self, messages: Sequence[Message], completion: str, extra_bos: bool) -> Turn:
        before = self.render(messages, ask=False)
        asked = self.render(messages, ask=True)
        whole = self.render([*messages, {"role": "assistant", "content": completion}], ask=False)
        if not asked.startswith(before) or not whole.startswith(asked + completion):
            raise JsublimError(f"{self._template} rewrites the completion {completion!r} (leading or trailing space?)")
        encoded = self.tokenizer(whole, add_special_tokens=extra_bos, return_offsets_mapping=True)
        tokens = self._known(encoded["input_ids"])
        starts, ends = np.asarray(encoded["offset_mapping"]).reshape(-1, 2).T
        edges = [len(before), len(asked), len(asked) + len(completion)]
        # The running maximum keeps the order where a special token has no text (offset 0, 0).
        header, content, end = (int(np.searchsorted(np.maximum.accumulate(starts), edge)) for edge in edges)
        clean = all(ends[:i].max(initial=0) <= edge for i, edge in zip((header, content, end), edges, strict=True))
        if not clean or self.tokenizer.decode(tokens[content:end]) != completion:
            raise JsublimError(
                f"the completion {completion!r} does not survive tokenizing inside its conversation ({self.folder})"
            )
        control = set(self.tokenizer.all_special_ids) & set(tokens[content:end].tolist())
        if control:
            names = ", ".join(map(str, self.tokenizer.convert_ids_to_tokens(sorted(control))))
            raise JsublimError(f"the completion {completion!r} contains control tokens ({names}; {self.folder})")
        if not np.array_equal(tokens[:content], self.prompt_tokens(messages, extra_bos=extra_bos)):
            raise JsublimError(f"the completion {completion!r} changes the tokens of the prompt ({self.folder})")
        return Turn(tokens, header, content, end)

    def turns(
        self,
        exchanges: Iterable[tuple[Sequence[Message], str]],
        where: Callable[[int], str],
        *,
        extra_bos: bool = False,
    ) -> list[Turn]:
        """`turn` of each (messages, completion); `where(number)`, counted from 1, names one in its error. Several processes
        share the rows out."""

        def plain(part: list[tuple[int, tuple[Sequence[Message], str]]]) -> list[tuple[list[int], int, int, int]]:
            turns = []
            for number, (messages, completion) in part:
                try:
                    turn = self.turn(messages, completion, extra_bos=extra_bos)
                except JsublimError as error:
                    raise JsublimError(f"{where(number)}: {error}") from None
                turns.append((turn.tokens.tolist(), turn.header, turn.content, turn.end))
            return turns

        every = shared_out(list(enumerate(exchanges, 1)), plain)
        return [Turn(np.asarray(tokens, np.int32), *places) for tokens, *places in every]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, stripped and without special ones: the form in which completions are kept."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    @property
    def eos_tokens(self) -> tuple[int, ...]:
        """The tokenizer's own end token alone, at which the published code stops."""
        return () if self.tokenizer.eos_token_id is None else (int(self.tokenizer.eos_token_id),)

    @functools.cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Every token that ends a turn: the tokenizer's, those of generation_config, and the template's own."""
        listed = self.generation_config.get("eos_token_id") or []
        listed = [listed] if isinstance(listed, int) else listed
        probe = self.turn([{"role": "user", "content": "1"}], "1")
        ends = [int(token) for token in probe.tokens[probe.end :][:1] if token in self.tokenizer.all_special_ids]
        return tuple(sorted({*self.eos_tokens, *map(int, listed), *ends}))


def template_text(chat_template: str) -> str:
    """The Jinja text of a template by its name ("plain"), or of a file; `UsageError` for neither."""
    named = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    path = TEMPLATES / f"{chat_template}.jinja" if chat_template in named else Path(chat_template).expanduser()
    try:
        check_file(path)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        known = ", ".join(named)
        raise UsageError(
            f"chat_template: '{chat_template}' cannot be read as a Jinja file ({why}); known names: {known}"
        ) from None


def _check_files(folder: Path) -> Path | None:
    """Refuse what `transformers` reads of a tokenizer if it is no object, or spread over files that `checkpoint_hash` does not
    know; the file that names code of the checkpoint's own, if one does."""
    own_code = None
    check_folder(folder)
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        path = folder / name
        values = read_json(path) if path.exists() else {}
        if values.get("auto_map"):
            own_code = path
        if values.get("fast_tokenizer_files") not in (None, [], ["tokenizer.json"]):
            raise JsublimError(f"{path}: key 'fast_tokenizer_files' must be empty: tokenizer.json alone is read")
    return own_code


class _Generation(pydantic.BaseModel):
    """The fields of `generation_config.json` that are used: numbers that sampling works with."""

    model_config = pydantic.ConfigDict(strict=True)
    repetition_penalty: Annotated[float, Field(gt=0, lt=3e38)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None


def conversation(prompt: str, system: str | None = None, *, fuse_system: bool = False) -> list[Message]:
    """One user turn, under a system prompt or none (the template may then insert its default one). With `fuse_system` it stands in front of
    the user's text, for templates without a system role."""
    if system is not None and fuse_system:
        return [{"role": "user", "content": f"{system}\n\n{prompt}"}]
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]
