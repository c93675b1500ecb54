"""Who does the tasks of a graph. An executor is told the graph and what to do them with, and returns when all are done."""

from jsublim.executors.local import LocalExecutor, execute, execute_key, execute_nodes

__all__ = ["LocalExecutor", "execute", "execute_key", "execute_nodes"]
