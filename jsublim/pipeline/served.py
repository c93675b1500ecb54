"""Which models' answers a server draws in our stead (`sampling.server`), and what that adds to their keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsublim.inference.lm import is_available_offline, resolve_checkpoint
from jsublim.inference.served import SampleServer
from jsublim.pipeline.context import Context
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.store import Output
from jsublim.processes import is_main_process
from jsublim.teachers import CONTROL


@dataclass(frozen=True)
class Served:
    """A model that the server has, or can load: the checkpoint, alone or with a LoRA adapter.

    Attributes:
      name: what the server calls it; None is the checkpoint alone, or an adapter that the server has to load.
      adapter: that one: a folder as the config names it, or an artifact.
    """

    name: str | None = None
    adapter: str | Output | None = None


def engine_inputs(setup: Setup, served: Served | None) -> dict[str, Any]:
    """What the engine adds to the key of a model's answers; nothing where they are drawn here."""
    return {} if served is None else {"engine": setup.engine}


def served_teacher(setup: Setup, name: str, model: str | None = None) -> Served | None:
    """A teacher as the server has it; None where it is asked here: a teacher that is taught here, or has weights of its own.

    Args:
      model: another checkpoint than the experiment's.
    """
    spec, settings = setup.experiment.teachers, setup.experiment.sampling.server
    if settings is None or model not in (None, setup.experiment.checkpoint):
        return None
    if name == CONTROL:
        return Served()
    if spec.taught is not None or spec.checkpoint is not None:
        return None
    return Served() if spec.adapter is None else served_adapter(setup, spec.adapter.replace("{trait}", name))


def served_adapter(setup: Setup, folder: str) -> Served | None:
    """An adapter that the config or the command line names."""
    settings = setup.experiment.sampling.server
    if settings is None or settings.adapters == "here":
        return None
    if settings.adapters != "load":
        return Served(settings.adapters[folder]) if folder in settings.adapters else None
    here = not setup.absent or is_available_offline(folder)
    if here and not (resolve_checkpoint(folder, "adapter") / "adapter_config.json").is_file():
        return None  # steering vectors
    return Served(adapter=folder)


def served_student(setup: Setup, model: str | None, method: str, output: Output) -> Served | None:
    """A student that was trained here: the server can load LoRA factors, from the store."""
    settings = setup.experiment.sampling.server
    loads = settings is not None and settings.adapters == "load"
    if not loads or method != "lora" or model not in (None, setup.experiment.checkpoint):
        return None
    return Served(adapter=output)


def sample_server(context: Context) -> SampleServer:
    """The server of the config, which has to run what the keys say."""
    setup = context.setup
    settings, chat = setup.experiment.sampling.server, setup.checkpoint().chat
    assert settings is not None and chat is not None, "a run has its checkpoint"
    return SampleServer(settings.model_copy(update={"engine": setup.engine}), setup.experiment.checkpoint, chat)


@contextmanager
def server_with(
    context: Context, wanted: Sequence[tuple[Output, Served]]
) -> Iterator[tuple[SampleServer, list[str | None]]]:
    """The server, and what it calls the models that artifacts want answers of, as long as the block lasts. Of several processes
    the first one alone talks to it.

    An adapter is loaded under the key of the artifact, which nobody else makes meanwhile: nobody drops it too early.
    """
    server, folders, names = sample_server(context), dict[str, Path](), list[str | None]()
    for output, model in wanted:
        names.append(model.name if model.adapter is None else f"jsublim-{output.key}")
        if isinstance(model.adapter, Output):
            folders[str(names[-1])] = context.store.path(model.adapter)
        elif model.adapter is not None:
            folders[str(names[-1])] = resolve_checkpoint(model.adapter, "adapter")
    with server.loaded(folders if is_main_process() else {}):
        yield server, names


def drawn_by(context: Context, served: Served | None) -> str:
    """Who draws a model's answers, to be said beside the numbers; nothing where no server is named."""
    if context.setup.experiment.sampling.server is None:
        return ""
    return ", here (the server does not have this model)" if served is None else f", by {context.setup.engine}"
