"""Our speed beside that of the stack that people use, on the same token ids in one run: `python -m benchmarks.compare --help`."""
