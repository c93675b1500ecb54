"""`jsublim serve`."""

from __future__ import annotations

import contextlib
import socket
from typing import Annotated

from jsublim.cli.app import Template, app, console, output
from jsublim.errors import UsageError


@app.command()
def serve(
    what: Annotated[list[str], "A run, or a checkpoint with the runs and adapters that stand on it."],
    *,
    host: Annotated[str, "Where to listen; beyond this machine JSUBLIM_API_KEY must be set."] = "127.0.0.1",
    port: Annotated[int, "0 takes one that is free.", {"min": 0, "max": 65535}] = 8000,
    slots: Annotated[int, "Answers that are drawn at one time.", {"min": 1, "max": 1024}] = 32,
    length: Annotated[int, "Tokens of a prompt and its answer together, at most.", {"min": 32}] = 1024,
    seconds: Annotated[float, "That an answer may take.", {"min": 1.0}] = 600.0,
    dtype: Annotated[str | None, "float32 or bfloat16; default: as the run says, or float32."] = None,
    chat_template: Template = None,
) -> None:
    """Answer requests in OpenAI's interface: a checkpoint, and every adapter and steering vector of a run by its name."""
    try:
        import uvicorn

        from jsublim.serve.app import ServeLimits, check_address, make_app
    except ImportError as error:
        raise UsageError(f"serve: {error.name} is not installed; pip install 'jsublim[serve]'") from None
    from jsublim.serve.catalogue import catalogue

    check_address(host)
    served = catalogue(what, dtype=dtype, chat_template=chat_template)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: cannot listen there ({error.strerror}); give another") from None
    # Every request has its line from the application; uvicorn adds what never became one.
    answering = make_app(served, ServeLimits(slots, length, seconds), console.out)
    settings = uvicorn.Config(answering, log_config=None, access_log=False, timeout_graceful_shutdown=5)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
    output.print(f"{len(served.names)} models on {address}")
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listening])
