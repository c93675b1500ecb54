"""Steering vectors as folders: `steering.safetensors` holds one vector per layer, under the names `layers.{i}`."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jsublim.errors import JsublimError, UsageError
from jsublim.models.lora import Adapter
from jsublim.models.tensors import read_float32, write_tensors

FILE = "steering.safetensors"
_KEY = re.compile(r"layers\.(\d{1,6})$", re.ASCII)


def save_steering(folder: Path, adapter: Adapter) -> None:
    """Write the vectors of an adapter into `folder` (made if absent); one that has some is a UsageError."""
    assert adapter.steering is not None
    file = folder / FILE
    if file.exists():
        raise UsageError(f"{file}: already exists; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    vectors = np.ascontiguousarray(adapter.steering)
    write_tensors(file, {f"layers.{layer}": vectors[i] for i, layer in enumerate(adapter.layers)})


def load_steering(folder: Path) -> Adapter:
    """Read the vectors that `save_steering` wrote into `folder`. An unreadable file, or anything in it but finite vectors `layers.{i}` of one size,
    is a JsublimError."""
    file = folder / FILE
    tensors = read_float32(file)
    layers = {int(match[1]): key for key in tensors if (match := _KEY.match(key))}
    shapes = {tensor.shape for tensor in tensors.values()}
    if len(layers) < len(tensors) or len(shapes) != 1 or len(shapes.pop()) != 1:
        raise JsublimError(
            f"{file}: expected vectors of one size under layers.<i>, found {', '.join(tensors) or 'none'}"
        )
    order = tuple(sorted(layers))
    return Adapter(order, steering=jnp.asarray(np.stack([tensors[layers[i]] for i in order])))
