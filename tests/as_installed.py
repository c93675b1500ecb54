"""`jsublim` where torch is not installed: `python as_installed.py COMMAND...`."""

import sys

import without_torch.sitecustomize  # noqa: F401 (before jsublim)

if __name__ == "__main__":
    sys.path.pop(0)  # the tests' own folder
    from jsublim.cli import main

    main()
