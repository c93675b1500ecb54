"""Students and teachers as others load them: a PEFT folder, or an ordinary Hugging Face folder with the adapter merged in."""

from __future__ import annotations

import shutil
from pathlib import Path

from jsublim.core.files import write_json
from jsublim.core.reading import read_json, read_yaml
from jsublim.errors import UsageError
from jsublim.exchange.cards import write_card
from jsublim.inference.lm import BUNDLED, is_available_offline, load_model, resolve_checkpoint
from jsublim.models import steering
from jsublim.models.checkpoint import TOKENIZER_FILES, new_folder, origin_of, read_config, write_checkpoint
from jsublim.models.lora import merge
from jsublim.models.peft import load_adapter
from jsublim.pipeline.publish import record_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / steering.FILE).is_file()


def is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def base_of(folder: Path, given: str | None) -> tuple[str, str | None]:
    """What an adapter stands on, as others find it, and its revision: what the user says, the adapter, or the run that
    it is of. Raises UsageError: nobody says it."""
    if given is not None:
        name, _, revision = given.partition("@")
        return name, revision or None
    values = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    recorded = values.get("base_model_name_or_path") or _model_of_the_run(folder)
    if not isinstance(recorded, str):
        raise UsageError(f"{folder}: does not say which checkpoint it stands on; give --base")
    if Path(recorded).parent == BUNDLED:
        return Path(recorded).name, None
    origin = origin_of(Path(recorded))  # of an adapter whose base is a folder of the hub's cache
    return origin.name or recorded, origin.commit or values.get("revision")


def _model_of_the_run(folder: Path) -> str | None:
    """The checkpoint that the config of a run names, if a folder of its store is asked about whose model that is."""
    record, run = record_of(folder) or {}, folder.absolute().parents[2:3]
    if not run or not (run[0] / "config.yaml").is_file() or record.get("inputs", {}).get("student_model") is not None:
        return None
    values = read_yaml(run[0] / "config.yaml")
    return values.get("model") if record and isinstance(values, dict) else None


def export_adapter(folder: Path, out: Path, base: str | None) -> None:
    """A folder that `peft` loads (of steering vectors, one that jsublim loads), with its base's name and a card.

    Raises:
      UsageError: `out` is not free, or nobody says what the base is.
      JsublimError: the adapter cannot be read.
    """
    name, revision = base_of(folder, base)
    vectors = (folder / steering.FILE).is_file()
    weights = steering.FILE if vectors else WEIGHTS
    asked = f"{name}@{revision}" if revision else name
    # Checked against the base's shapes, where the base is here.
    load_adapter(folder, read_config(resolve_checkpoint(asked))[1] if is_available_offline(asked) else None)
    with new_folder(out) as scratch:
        shutil.copyfile(folder / weights, scratch / weights)
        if not vectors:
            values = read_json(folder / CONFIG) | {"base_model_name_or_path": name, "revision": revision}
            write_json(scratch / CONFIG, values)
        write_card(scratch, folder, "vectors" if vectors else "adapter", name, revision)


def export_merged(
    folder: Path, out: Path, base: str | None, dtype: str | None = None, chat_template: str | None = None
) -> None:
    """A checkpoint that any library loads: the base with the adapter written into it, in the base's dtype unless another one is
    given, and a card.

    Raises:
      UsageError: `out` is not free, the base is not known, or steering vectors, which no weight can hold.
      JsublimError: the base or the adapter cannot be read.
    """
    if (folder / steering.FILE).is_file():
        raise UsageError(f"{folder}: holds steering vectors, which no weight can hold; export it without --merged")
    name, revision = base_of(folder, base)
    checkpoint = resolve_checkpoint(f"{name}@{revision}" if revision else name, "--base")
    values = read_config(checkpoint)[0]
    dtype = dtype or str(values.get("dtype") or values.get("torch_dtype") or "float32")
    lm = load_model(str(checkpoint), dtype, chat_template=chat_template)
    params = merge(lm.params, load_adapter(folder, lm.config))
    with new_folder(out) as scratch:
        options = {"tokenizer": checkpoint, "chat_template": lm.chat.given_template}
        write_checkpoint(scratch, lm.config, params, lm.hf_config, dtype=dtype, **options)
        write_card(scratch, folder, "checkpoint", name, revision)


def export_checkpoint(folder: Path, out: Path, base: str | None) -> None:
    """A student whose whole weights were trained is a checkpoint already: its files, and a card. Raises UsageError:
    `out` is not free."""
    kept = {"config.json", "model.safetensors.index.json", *TOKENIZER_FILES}
    files = [path for path in folder.iterdir() if path.name in kept or path.suffix == ".safetensors"]
    with new_folder(out) as scratch:
        for path in files:
            shutil.copyfile(path, scratch / path.name)
        try:
            name, revision = base_of(folder, base)
        except UsageError:  # it stands alone
            name, revision = "not recorded", None
        write_card(scratch, folder, "checkpoint", name, revision)
