"""The command line. Thin: it reads options, calls a stage, prints what came of it. A module registers its commands when it is imported."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from typing import Any

import typer

from jsublim.cli import (  # noqa: F401
    analysis,
    exchange,
    experiments,
    forecast,
    launch,
    listing,
    scan,
    serve,
    showing,
    stages,
)
from jsublim.cli.app import app
from jsublim.cli.together import Speaker
from jsublim.errors import JsublimError, one_line

AT_ONCE = ("export", "import", "push", "convert", "cp", "prompts", "steer", "rescore", "report")  # nothing is continued


def main() -> None:
    """Entry point: errors become one line, exit codes 0, 2 (usage or config), 75 (stopped, to be started again) and 1."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    for name in ("absl", "orbax", "jax", "transformers"):
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except JsublimError as error:
        _leave(debug, f"error: {Speaker.name}{error}", error.code)
    except (KeyboardInterrupt, typer.Abort):
        program = [sys.executable, "-m", "jsublim"] if sys.argv[0].endswith("__main__.py") else [sys.argv[0]]
        # Where it is on the path its name is enough; the environment may not be activated.
        again = shlex.join([*(["jsublim"] if shutil.which("jsublim") else program), *sys.argv[1:]])
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        kept = "what it writes is there whole or not at all; to begin anew, run the same command again"
        kept = kept if command in AT_ONCE else "what was finished is kept; to continue, run the same command again"
        _leave(debug, f"interrupted; {kept}:\n  {again}", 1)
    except OSError as error:
        reason = one_line(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}")
        _leave(debug, f"error: {Speaker.name}{reason}; mend that, then run the same command again", 1)
    except Exception as error:
        if isinstance(getattr(error, "exit_code", None), int) and hasattr(error, "show"):  # the parser's own
            _usage(error)
            sys.exit(2)
        _leave(debug, f"error: {Speaker.name}{type(error).__name__}: {one_line(str(error))}; --debug shows where", 1)


def _usage(error: Any) -> None:
    """Print the mistake of a command line in one line; the help itself, where nothing was asked."""
    message = error.format_message().strip()
    if not message or "\n" in message:
        error.show()
        return
    names, context = ["--help"], getattr(error, "ctx", None)
    while context is not None and context.parent is not None:
        names, context = [context.info_name, *names], context.parent
    print(f"error: {message.rstrip('.')}; see `{' '.join(['jsublim', *names])}`", file=sys.stderr)


def _leave(debug: bool, message: str, code: int) -> None:
    if debug:
        raise
    print(message, file=sys.stderr)
    sys.exit(code)
