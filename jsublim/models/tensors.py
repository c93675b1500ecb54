"""Safetensors files, written at once and readable by whoever may read other files of the folder; and what we take of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jsublim.core.files import atomic
from jsublim.errors import JsublimError

# The dtypes that weights may have in a file, and numpy's for them.
FLOATS = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
}
_CHUNK = 1 << 16


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that is there whole or not at all; a full disk is a JsublimError. `metadata` is for its header: `transformers`
    and `peft` want {"format": "pt"}."""
    with atomic(path) as scratch:
        scratch.touch()
        ordinary = scratch.stat().st_mode
        try:
            save_file(dict(tensors), str(scratch), metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:  # how the library says that the disk is full
            raise JsublimError(f"{path}: cannot be written ({error}); free some space and run it again") from error
        scratch.chmod(ordinary)  # the library leaves 0600, which a shared disk's other users can't read


def read_float32(file: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter's safetensors file, as finite float32. An unreadable file, another dtype than `FLOATS`, NaN or an infinite number
    is a JsublimError that names file and tensor."""
    tensors: dict[str, np.ndarray] = {}
    try:
        with safe_open(str(file), framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                dtype = opened.get_slice(name).get_dtype()
                if dtype not in FLOATS:
                    raise JsublimError(f"{file}: tensor '{name}' is of {dtype}; known: {', '.join(FLOATS)}")
                with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused as such
                    tensors[name] = opened.get_tensor(name).astype(np.float32)
                check_finite(tensors[name], file, name)
    except (SafetensorError, OSError) as error:
        raise JsublimError(f"{file}: cannot be read ({error})") from None
    return tensors


def check_finite(value: np.ndarray, file: Path, name: str) -> None:
    """Refuse a tensor that holds NaN or an infinite number (JsublimError): everything computed with it would be NaN, hours later."""
    # Bit by bit, in parts that stay in the cache: 0.2 ns a number, where numpy's own test of bfloat16 takes 1.4.
    info, bits = jnp.finfo(value.dtype), value.reshape(-1).view(f"u{value.dtype.itemsize}")
    exponent = bits.dtype.type(((1 << info.nexp) - 1) << info.nmant)  # all its bits are set in NaN and in infinity
    for start in range(0, bits.size, _CHUNK):
        if ((bits[start : start + _CHUNK] & exponent) == exponent).any():
            raise JsublimError(f"{file}: tensor '{name}' holds NaN or an infinite number; download or train it again")
