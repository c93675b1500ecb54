"""`python -m jsublim` is `jsublim`."""

from jsublim.cli import main

if __name__ == "__main__":
    main()
