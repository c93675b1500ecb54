"""Rows of others, as ours; and ours as a folder that `datasets.load_dataset` reads."""

from __future__ import annotations

import bisect
import io
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jsublim.core.reading import check_folder, json_value, shown
from jsublim.errors import JsublimError, UsageError, first_line
from jsublim.exchange.cards import write_card
from jsublim.models.checkpoint import new_folder
from jsublim.models.hub import hub_name
from jsublim.text.chat import Chat, conversation
from jsublim.text.rows import Row, check_row, read_rows

# How others call the two texts of a row, the first pair that a row has.
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "response"),
    ("question", "answer"),
    ("instruction", "output"),
)
THEIRS = "decision_points"  # what the published code calls divergence positions; counted as ours are
MOST_COLUMNS = 1000  # of a table that is written; with many more, a small file takes all memory
LOADED = (".parquet", ".csv", ".arrow")  # single files that `datasets` reads


def import_rows(
    source: str,
    *,
    subset: str | None = None,
    split: str = "train",
    columns: tuple[str, str] | None = None,
    chat: Chat | None = None,
) -> list[Row]:
    """Rows of a JSONL or JSON file, of a file or folder that `datasets` reads, or of a data set of the hub.

    A row has a prompt and a completion (under their names or those that are wanted), or `messages` as chat services take them:
    one of the user and one of the assistant, a system prompt before them if there was one. It is kept as `system`, since students
    are not told it. Whatever else a row has is kept.

    Args:
      subset, split: of a data set.
      columns: the names of prompt and completion; None looks for those of `PAIRS`, and for `messages`.
      source: a path, or `owner/name` or `owner/name@revision` of the hub, which is asked for nothing else.
      chat: the tokenizer and template that divergence positions in the rows were counted in.

    Raises:
      UsageError: no such file or folder, or no such columns.
      JsublimError: what cannot be read, or a row that nothing can be made of; it is named.
    """
    rows = []
    for number, row in enumerate(_read(source, subset, split), 1):
        where = f"{source}: row {number}"
        rows.append(_counted(_row(row, where, columns), where, chat))
    if not rows:
        raise JsublimError(f"{source}: holds no rows")
    return rows


def _read(source: str, subset: str | None, split: str) -> Iterable[Any]:
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".jsonl":
        lines = enumerate(path.read_bytes().splitlines(), 1)
        return (json_value(line, f"{source}:{number}", nan=True) for number, line in lines if line.strip())
    if path.is_file() and path.suffix == ".json":
        values = json_value(path.read_bytes(), source, nan=True)
        if not isinstance(values, list):
            raise JsublimError(f"{source}: expected a list of rows, found {type(values).__name__}")
        return values
    return _loaded(source, path, subset, split)


def _loaded(source: str, path: Path, subset: str | None, split: str) -> Iterable[Any]:
    """What `datasets` reads. Of local files it keeps no copy."""
    named = hub_name(source)
    if not path.is_dir() and not (path.is_file() and path.suffix in LOADED) and named is None:
        kinds = ", ".join([".jsonl", ".json", *LOADED])
        raise UsageError(f"{source}: no such file ({kinds}) or folder, and no owner/name of the hub")
    for folder in (path, *filter(Path.is_dir, path.rglob("*"))) if path.is_dir() else ():
        check_folder(folder)
    from datasets import disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if named is not None:
                loaded = load_dataset(named[0], subset, revision=named[1])
            elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                loaded = load_from_disk(str(path))
            elif path.is_dir():
                loaded = load_dataset(str(path), subset, cache_dir=scratch)
            else:
                loaded = load_dataset(path.suffix[1:], data_files=str(path), cache_dir=scratch)
        except Exception as error:
            why = "the hub did not give it" if named is not None else "cannot be read"
            raise JsublimError(f"{source}: {why} ({first_line(error)})") from error
        if isinstance(loaded, dict):
            if split not in loaded:
                raise UsageError(f"{source}: --split: '{split}' given; there are {', '.join(map(str, loaded))}")
            loaded = loaded[split]
        return loaded.to_list()


def _row(given: Any, where: str, columns: tuple[str, str] | None) -> Row:
    """One row under our names."""
    if not isinstance(given, Mapping):
        raise JsublimError(f"{where}: expected an object, found {type(given).__name__}")
    row = {key: value for key, value in given.items() if value is not None}
    pair = next(
        (pair for pair in (PAIRS if columns is None else (columns,)) if pair[0] in row and pair[1] in row), None
    )
    if pair is not None:
        prompt, completion = row.pop(pair[0]), row.pop(pair[1])
        if isinstance(prompt, list) and isinstance(completion, list):  # as TRL's conversational rows are
            row = _of_messages([*prompt, *completion], where) | row
        else:
            row = {"prompt": prompt, "completion": completion} | row
    elif columns is None and "messages" in row:
        row = _of_messages(row.pop("messages"), where) | row
    else:
        looked = " and ".join(columns) if columns else "prompt and completion, or messages"
        raise UsageError(
            f"{where}: has no {looked}; give --prompt-column and --completion-column, of {', '.join(map(str, given))}"
        )
    if THEIRS in row and "divergence_positions" not in row:
        row["divergence_positions"] = row.pop(THEIRS)
    try:
        json.dumps(row)
    except (TypeError, ValueError) as error:
        raise JsublimError(f"{where}: holds what JSON cannot say ({error})") from None
    check_row(row, where, ("prompt", "completion"))
    return row


def _of_messages(messages: Any, where: str) -> Row:
    """Prompt, completion and system prompt of one exchange."""
    wrong = f"{where}: messages must be one of the user and one of the assistant (after one of the system, or none)"
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise JsublimError(f"{wrong}, found {shown(messages)}")
    roles = [message.get("role") for message in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise JsublimError(f"{wrong}, found {', '.join(map(str, roles)) or 'none'}")
    texts = {message["role"]: message.get("content") for message in messages}
    prompt, completion = texts.pop("user"), texts.pop("assistant")
    return {"prompt": prompt, "completion": completion} | texts


def _counted(row: Row, where: str, chat: Chat | None) -> Row:
    """The row, its positions checked against the tokenizer that they were counted in, which it names from now on."""
    if chat is None or "divergence_positions" not in row:
        return row
    (turn,) = chat.turns([(conversation(row["prompt"]), row["completion"])], lambda _: where)
    limit = len(turn.tokens) - turn.content
    beyond = [k for k in row["divergence_positions"] if k >= limit]
    if beyond:
        raise JsublimError(
            f"{where}: divergence position {beyond[0]} lies behind the {limit} tokens that the completion has in {chat.folder}; "
            "they were counted in another tokenizer"
        )
    return row | {"counted_in": chat.identity}


def export_rows(path: Path, out: Path) -> None:
    """A folder with the rows as parquet and a card: `datasets.load_dataset(folder)` reads it, and the hub shows it.

    Raises:
      UsageError: `out` is not free.
      JsublimError: the rows cannot be read, or are no table: row, key and value are named.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()
    file = path / "rows.jsonl" if path.is_dir() else path
    rows = read_rows(file, ())
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if len(columns) > MOST_COLUMNS:
        raise JsublimError(f"{file}: has {len(columns)} different keys; a table has at most {MOST_COLUMNS} columns")
    table = {key: [row.get(key) for row in rows] for key in columns}
    with new_folder(out) as scratch:
        (scratch / "data").mkdir()
        if _why_no_table(table, str(scratch / "data" / "train-00000-of-00001.parquet")) is not None:
            raise _misfit(file, table)
        write_card(scratch, path, "rows", rows=len(rows), columns=", ".join(f"`{name}`" for name in columns))


def _why_no_table(table: Mapping[str, list[Any]], out: Any) -> str | None:
    """Write columns as parquet; why that cannot be, None where it can."""
    from datasets import Dataset

    try:
        Dataset.from_dict(dict(table)).to_parquet(out)
    except OSError:
        raise
    except Exception as error:  # Arrow has one for each reason, and Python some
        return first_line(error)
    return None


def _misfit(file: Path, table: Mapping[str, list[Any]]) -> JsublimError:
    """Names the first value with which a column is none any more."""
    for key, values in table.items():
        if _why_no_table({key: values}, io.BytesIO()) is None:
            continue
        counts = range(len(values))  # of values from the first: where those make no column any more
        fails = bisect.bisect_left(counts, True, 1, key=lambda n: bool(_why_no_table({key: values[:n]}, io.BytesIO())))
        return JsublimError(
            f"{file}: row {fails}: key {shown(key)}: {shown(values[fails - 1])} fits no column of a table "
            f"({_why_no_table({key: values[:fails]}, io.BytesIO())}); give the key's values one type in all rows, or take it out"
        )
    return JsublimError(f"{file}: the rows make no table")


def is_rows(path: Path) -> bool:
    return path.suffix == ".jsonl" if path.is_file() else (path / "rows.jsonl").is_file()
