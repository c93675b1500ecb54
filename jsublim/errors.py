"""The errors a user sees: one line that names the file, the key, the value and the fix."""


class JsublimError(Exception):
    """A failure the user can act on. The command line prints it without a traceback and exits with `code`."""

    code = 1


class UsageError(JsublimError):
    """Bad usage or a bad configuration (exit code 2)."""

    code = 2
