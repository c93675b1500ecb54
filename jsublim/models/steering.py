"""Steering vectors as folders: `steering.safetensors`, a vector a layer under `layers.{i}`."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jsublim.errors import JsublimError, UsageError
from jsublim.models.lora import Adapter

FILE = "steering.safetensors"
_KEY = re.compile(r"layers\.(\d+)$")


def save_steering(folder: Path, adapter: Adapter) -> None:
    """Write the vectors of an adapter into `folder` (made if absent).

    Raises:
      UsageError: vectors are there already.
    """
    assert adapter.steering is not None
    file = folder / FILE
    if file.exists():
        raise UsageError(f"{file}: already exists; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    vectors = np.asarray(adapter.steering)
    tensors = {f"layers.{layer}": np.ascontiguousarray(vectors[i]) for i, layer in enumerate(adapter.layers)}
    scratch = file.with_suffix(".partial")
    save_file(tensors, str(scratch))
    scratch.rename(file)


def load_steering(folder: Path) -> Adapter:
    """Raises:
    JsublimError: an unreadable file, or anything in it but vectors `layers.{i}` of one size.
    """
    file = folder / FILE
    try:
        tensors = load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise JsublimError(f"{file}: cannot be read ({error})") from None
    layers = {int(match[1]): key for key in tensors if (match := _KEY.match(key))}
    if (
        len(layers) < len(tensors)
        or not tensors
        or len({t.shape for t in tensors.values()}) > 1
        or next(iter(tensors.values())).ndim != 1
    ):
        raise JsublimError(
            f"{file}: expected vectors of one size under layers.<i>, found {', '.join(tensors) or 'none'}"
        )
    order = tuple(sorted(layers))
    return Adapter(order, steering=jnp.asarray(np.stack([tensors[layers[i]] for i in order]), jnp.float32))
