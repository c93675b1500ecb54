"""A server of completions (`completions_server.py`) as a process of a test module, and how it behaves."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any


class ServedProcess:
    """A checkpoint's folder, served at `address`; once started again, at the same one."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, 0
        self.start()

    def start(self) -> None:
        server = Path(__file__).with_name("completions_server.py")
        command = [sys.executable, str(server), str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline().rpartition(":")[2])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", data) as said:
            return json.loads(said.read())

    def behave(self, **how: Any) -> None:
        self.ask("/behave", how)

    @property
    def seen(self) -> list[dict[str, Any]]:
        """The completions that were asked for since `behave`."""
        return self.ask("/seen")
