"""Put first on PYTHONPATH: torch is not installed, as for most users. transformers would load it, which takes longer than many a command."""

import gc
import sys
from importlib.machinery import PathFinder


class NoTorch(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


gc.set_threshold(100_000, 20, 20)  # as in conftest.py
sys.meta_path[sys.meta_path.index(PathFinder)] = NoTorch
