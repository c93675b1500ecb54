"""The errors a user sees: one line that names the file, the key, the value and the fix."""

import re


class JsublimError(Exception):
    """A failure the user can act on. The command line prints it without a traceback and exits with `code`."""

    code = 1

    def __str__(self) -> str:
        """One line, whatever the names and messages in it hold."""
        line = re.sub(r"\s*\n\s*", " ", super().__str__())
        return "".join(c if c.isprintable() else "\ufffd" for c in line)


class UsageError(JsublimError):
    """Bad usage or a bad configuration (exit code 2)."""

    code = 2


def first_line(error: BaseException) -> str:
    """What a library says of an error, without its list of details."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(text: str) -> str:
    """Text that any terminal and any font can show: line breaks and control characters by their escapes."""
    return printable(text, keep="")


def printable(text: str, keep: str = "\n\t") -> str:
    """Text without what moves a terminal's cursor, colours it or turns its lines around: that is shown by its escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
