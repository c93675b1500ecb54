"""Steering vectors as folders: `steering.safetensors` holds one vector per layer, under the names `layers.{i}`."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jsublim.errors import JsublimError, UsageError
from jsublim.models.lora import Adapter
from jsublim.models.tensors import read_float32, write_tensors

FILE = "steering.safetensors"
_KEY = re.compile(r"layers\.(\d{1,6})$", re.ASCII)


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
    write_tensors(file, tensors)


def load_steering(folder: Path) -> Adapter:
    """Read the vectors that `save_steering` wrote into `folder`.

    Raises:
      JsublimError: an unreadable file, or anything in it but finite vectors `layers.{i}` of one size.
    """
    file = folder / FILE
    try:
        with safe_open(str(file), framework="np") as opened:
            tensors = {key: read_float32(opened, file, key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
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
    return Adapter(order, steering=jnp.asarray(np.stack([tensors[layers[i]] for i in order])))
