"""Safetensors files, written at once and readable by whoever may read other files of the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jsublim.files import atomic


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that is there whole or not at all.

    Args:
      metadata: what its header says; `transformers` and `peft` want {"format": "pt"}.
    """
    with atomic(path) as scratch:
        scratch.touch()
        ordinary = scratch.stat().st_mode
        save_file(dict(tensors), str(scratch), metadata=None if metadata is None else dict(metadata))
        scratch.chmod(ordinary)  # the library leaves 0600, which a shared disk's other users can't read
