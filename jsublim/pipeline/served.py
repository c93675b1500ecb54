"""Which models' answers a server draws in our stead (`sampling.server`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jsublim.inference.lm import is_available_offline
from jsublim.inference.served import SampleServer
from jsublim.pipeline.context import Context
from jsublim.pipeline.setup import Setup
from jsublim.pipeline.stage import Node
from jsublim.pipeline.values import Folder, Model, path_of
from jsublim.runtime.processes import is_main_process


@dataclass(frozen=True)
class Served:
    """A model that the server has, or can load: the checkpoint, alone or with a LoRA adapter.

    Attributes:
      name: what the server calls it; None is the checkpoint alone, or an adapter that the server has to load.
      adapter: that one.
    """

    name: str | None = None
    adapter: Folder | Node | None = None


def served(setup: Setup, model: Model) -> Served | None:
    """A model as the server has it; None where it is asked here: on another checkpoint, with weights of its own, or with an adapter
    that the server cannot load."""
    settings, adapter = setup.experiment.sampling.server, model.adapter
    if settings is None or model.weights is not None or model.checkpoint is not setup.checkpoint():
        return None
    if adapter is None:
        return Served()
    if isinstance(adapter, Node):  # the server can load the factors of a student, from the store
        trained = adapter.kind == "students" and adapter.given.settings.adapter.method == "lora"
        return Served(adapter=adapter) if trained and settings.adapters == "load" else None
    if isinstance(settings.adapters, dict):
        return Served(settings.adapters[adapter.name]) if adapter.name in settings.adapters else None
    if settings.adapters == "here":
        return None
    here = not setup.absent or is_available_offline(adapter.name)
    steering = here and not (adapter.path() / "adapter_config.json").is_file()
    return None if steering else Served(adapter=adapter)


def sample_server(context: Context) -> SampleServer:
    """The server of the config, which has to run what the keys say."""
    setup = context.setup
    settings, chat = setup.experiment.sampling.server, setup.checkpoint().chat
    assert settings is not None and chat is not None, "a run has its checkpoint"
    return SampleServer(settings.model_copy(update={"engine": setup.engine}), setup.experiment.checkpoint, chat)


@contextmanager
def server_with(
    context: Context, wanted: Sequence[tuple[str, Served]]
) -> Iterator[tuple[SampleServer, list[str | None]]]:
    """The server, and what it calls the models that artifacts, told by their keys, want answers of, as long as the block lasts. Of
    several processes the first one alone talks to it.

    An adapter is loaded under the key of the artifact, which nobody else makes meanwhile: nobody drops it too early.
    """
    server, folders, names = sample_server(context), dict[str, Path](), list[str | None]()
    for key, model in wanted:
        names.append(model.name if model.adapter is None else f"jsublim-{key}")
        if model.adapter is not None:
            folders[str(names[-1])] = path_of(model.adapter, context.store)
    with server.loaded(folders if is_main_process() else {}):
        yield server, names


def drawn_by(context: Context, served: Served | None) -> str:
    """Who draws a model's answers, to be said beside the numbers; nothing where no server is named."""
    if context.setup.experiment.sampling.server is None:
        return ""
    return ", here (the server does not have this model)" if served is None else f", by {context.setup.engine}"
