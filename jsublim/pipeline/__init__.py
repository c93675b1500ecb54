"""The graph of tasks: everything that a config asks for, as pieces of work that are known before any of it is done."""
