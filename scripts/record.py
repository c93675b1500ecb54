"""Records what a command shows on a terminal of 80 columns, as text: `python scripts/record.py FILE COMMAND ...`.

What stays on the screen is written as it is; what moves (the bars) once a minute, with the time before it. Below stands what the estimate
of the time left was worth: at each minute the whole time that it implied, beside the one that it took.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

WIDTH, HEIGHT, EVERY = 80, 40, 60.0
CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")
BARS = "whole run"
LEFT = re.compile(r"([\d:]+) so far, about ([\d:]+) left")


class Screen:
    """Lines of text under the few controls that our bars use: to the line's beginning, up, and erase."""

    def __init__(self) -> None:
        self.lines, self.row, self.column = [""], 0, 0

    def write(self, text: str) -> None:
        place = 0
        while place < len(text):
            if match := CONTROL.match(text, place):
                self._control(match[1], match[2])
                place = match.end()
                continue
            self._put(text[place])
            place += 1

    def _control(self, number: str, name: str) -> None:
        if name == "A":
            self.row = max(self.row - int(number or 1), 0)
        elif name == "K":
            self.lines[self.row], self.column = "", 0

    def _put(self, letter: str) -> None:
        if letter == "\r":
            self.column = 0
        elif letter == "\n":
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        else:
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
            self.column += 1


def seconds(text: str) -> int:
    whole = 0
    for part in text.split(":"):
        whole = 60 * whole + int(part)
    return whole


def main() -> None:
    place, command = Path(sys.argv[1]), sys.argv[2:]
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(WIDTH), "NO_COLOR": "1"}
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=terminal, stderr=terminal, stdin=terminal, env=environment)
    os.close(terminal)
    screen, decode, looks, said = Screen(), codecs.getincrementaldecoder("utf-8")("replace").decode, 1, []
    shown = [f"$ {shlex.join(command)}"]
    kept = 0  # lines that are written down
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        screen.write(decode(data))
        if time.monotonic() - began > looks * EVERY:
            looks += 1
            # The bars are the last thing on the screen; one that has just begun has no "━".
            bars = next((i for i in range(kept, len(screen.lines)) if screen.lines[i].startswith(BARS)), None)
            if bars is not None and (match := LEFT.search(screen.lines[bars])):
                said.append((seconds(match[1]), seconds(match[2])))
                shown += [line.rstrip() for line in screen.lines[kept:bars] if line.strip()]
                shown += [f"    {line.rstrip()}" for line in screen.lines[bars:] if line.strip()]
                kept = bars
    code, took = child.wait(), time.monotonic() - began
    shown += [line.rstrip() for line in screen.lines[kept:]]
    minutes, rest = divmod(round(took), 60)
    text = "\n".join(shown).rstrip()
    rows = [f"{at:>5} s: about {at + left:>5} s in all, {(at + left) / took:.2f} of {took:.0f}" for at, left in said]
    place.write_text(f"{text}\n\n({minutes}:{rest:02} in all)\n", encoding="utf-8")
    print("\n".join([*rows, f"exit code {code}; written to {place}"]))


if __name__ == "__main__":
    main()
