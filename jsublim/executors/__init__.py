"""Who does the tasks of several experiments. An executor is told the tasks and what to do them with, and returns when all are done."""

from jsublim.executors.local import execute, execute_nodes, execute_tasks, execute_work

__all__ = ["execute", "execute_nodes", "execute_tasks", "execute_work"]
