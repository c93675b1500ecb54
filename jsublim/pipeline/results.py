"""Results: every artifact's numbers gathered into the run's folder, from which alone the report is made."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from jsublim.config import Config
from jsublim.core.files import PARTIAL, atomic, read_table, remove_abandoned, write_json, write_table, write_text
from jsublim.core.section import facts
from jsublim.errors import UsageError
from jsublim.judge.server import ServerJudge
from jsublim.models.decoder import parameter_count
from jsublim.pipeline.arms import Source, Student, Writer
from jsublim.pipeline.context import Context
from jsublim.pipeline.graph import Graph
from jsublim.pipeline.origins import dataset_of, strategy
from jsublim.pipeline.readings import RowReading
from jsublim.pipeline.stage import Node
from jsublim.pipeline.stages.audit import MEANS
from jsublim.pipeline.stages.divergence import merged
from jsublim.pipeline.stages.evaluations import ANSWERS, RECORDS
from jsublim.pipeline.store import RECORD, Output, Store, versions
from jsublim.pipeline.values import Rows, diverged
from jsublim.report.tables import read_json
from jsublim.text.chat import Chat
from jsublim.text.rows import read_rows

K = TypeVar("K", Source, Writer)
SHOWN = 2  # rows of a teacher whose divergence tokens are known; of another one, one
MARK = "config.hash"  # of a run's folder: the key of what its results hang on
TIMES = "times.log"  # there too: a line for each thing that a call did
_WHO = {
    "arm": "string",
    "role": "string",
    "teacher": "string",
    "condition": "string",
    "seed": "int64",
    "evaluation": "string",
}
RESULTS = pa.schema([*pa.schema(_WHO), *RECORDS])
TRAINING = pa.schema(
    {"arm": "string", "step": "int64", "loss": "float64", "tokens": "int64", "lr": "float64", "grad_norm": "float64"}
)
_AUDITED = pa.schema({"teacher": "string", "data": "string", "draw": "int64", "variant": "string"})
AUDITS = pa.schema([*_AUDITED, *MEANS, *pa.schema({"top_divergence": "float64", "divergence_share": "float64"})])


def gather(graph: Graph, context: Context, key: str, started: str) -> Path:
    """Write `results/` and the report; returns the report's path.

    Args:
      key: what the results hang on; started: when the run was begun.
    """
    setup, store = context.setup, context.store
    results = setup.experiment.run_dir / "results"
    results.mkdir(parents=True, exist_ok=True)
    rows, answers, training = [], [], []
    for labels, output in graph.evaluations:
        folder = store.path(output)
        rows += [labels | record for record in read_table(folder / "records.parquet")]
        who = {"arm": labels["arm"], "evaluation": labels["evaluation"]}
        answers += [who | row for row in read_table(folder / "answers.parquet")]
    lost = {student.name: diverged(store, output) for student, output in graph.students.items()}
    sound = [student for student in graph.students if lost[student.name] is None]
    for student, output in graph.students.items():
        metrics = read_rows(store.file(output, "metrics.jsonl"), ("step",))
        training += [{"arm": student.name} | line for line in metrics]
    write_table(results / "results.parquet", rows, RESULTS)
    answered = pa.schema([*pa.schema({"arm": "string", "evaluation": "string"}), *ANSWERS])
    write_table(results / "answers.parquet", answers, answered)
    write_table(results / "training.parquet", training, TRAINING)
    write_json(results / "arms.json", [_student(context, student, graph.students[student]) for student in sound])
    write_json(results / "diverged.json", {name: what for name, what in lost.items() if what is not None})
    generation = [
        _added(parts) | {"strategy": writer.strategy, "model": writer.model} | _students(writer)
        for writer, parts in _together(graph.answers, store).items()
    ]
    divergence = [
        merged(parts) | {"data": source.dataset} | _students(source)
        for source, parts in _together(graph.divergence, store).items()
    ]
    write_json(results / "generation.json", generation)
    write_json(results / "divergence.json", divergence)
    write_json(results / "rows.json", _examples(graph, context))
    if graph.attribution:
        paths = (store.path(output) / "attribution.parquet" for output in graph.attribution.values())
        with atomic(results / "attribution.parquet") as scratch:
            pq.write_table(pa.concat_tables([pq.ParquetFile(path).read() for path in paths]), scratch)
    if graph.audits:
        write_table(results / "audit.parquet", list(_audits(graph, store)), AUDITS)
    write_json(results / "run.json", _about(context, key, started) | {"device": _devices(graph, store)})
    # Read here: what a report is drawn with takes as long to load as all else together, and workers write none.
    from jsublim.report.html import write_report

    return write_report(setup.experiment.run_dir)


def _examples(graph: Graph, context: Context) -> list[dict[str, Any]]:
    """For the report, the first rows with a divergence token of each teacher and data set, then one row of each teacher without any.

    Each has `teacher`, `data`, `prompt` and `tokens`: pieces of the answer (`text`), a divergence token with its `readings`: what
    each teacher's most probable token was (`says`), and by how many logits before its second.
    """
    chat = context.setup.checkpoint().chat
    assert chat is not None, "a run has its checkpoint"
    examples, read = [], set()
    for source, rows in graph.divergence.items():
        if source.parent is None and (source.teacher, source.dataset) not in read:  # of several draws the first
            read.add((source.teacher, source.dataset))
            whose = {"teacher": source.teacher, "data": source.dataset}
            both = zip(rows.read(context.store), rows.readings(context.store), strict=False)
            for row, reading in itertools.islice((pair for pair in both if pair[1]["divergence_positions"]), SHOWN):
                examples.append(whose | {"prompt": row["prompt"], "tokens": _tokens(chat, reading)})
    teachers = {teacher for teacher, _ in read}
    for writer, rows in graph.answers.items():
        if writer.teacher not in teachers:
            teachers.add(writer.teacher)
            row = rows.read(context.store)[0]
            tokens = [{"text": row["completion"]}]
            examples.append({"teacher": writer.teacher, "data": None, "prompt": row["prompt"], "tokens": tokens})
    return examples


def _tokens(chat: Chat, reading: RowReading) -> list[dict[str, Any]]:
    """The answer in pieces: a divergence token is a piece, and so is all between two of them."""
    tokens, positions = reading["tokens"].tolist(), set(reading["divergence_positions"])
    pieces: list[dict[str, Any]] = []
    for k, token in enumerate(tokens):
        text = _after(chat, tokens[:k], token)
        if k in positions:
            argmax, margins = reading["argmax"][:, k].tolist(), reading["margin"][:, k].tolist()
            readings = [
                {"teacher": teacher, "says": _after(chat, tokens[:k], most), "margin": round(margin, 3)}
                for teacher, most, margin in zip(reading["teachers"], argmax, margins, strict=True)
            ]
            pieces.append({"text": text, "readings": readings})
        elif pieces and "readings" not in pieces[-1]:
            pieces[-1]["text"] += text
        else:
            pieces.append({"text": text})
    return pieces


def _after(chat: Chat, before: list[int], token: int) -> str:
    """The text that a token adds to those before it: a token's own text may lack the space in front of it."""
    decode = chat.tokenizer.decode
    start, whole = decode(before), decode([*before, token])
    return whole[len(start) :] if whole.startswith(start) else decode([token])


def _student(context: Context, student: Student, node: Node) -> dict[str, Any]:
    """What makes a student what it is, for whoever compares them."""
    setup = context.setup
    dataset = dataset_of(setup, student.source).facts() | {"strategy": strategy(setup, student.source)}
    return {
        "arm": student.name,
        "teacher": student.teacher,
        "condition": student.tokens,
        "seed": student.seed,
        "variant": student.arm,
        "settings": facts(student.settings),
        "dataset": dataset,
        "num_layers": setup.checkpoint(student.settings.model).config.num_layers,
        "artifact": node.key,
        "drawn": _drawn(context, student, node.given.lessons[0].rows),
    }


def _drawn(context: Context, student: Student, rows: Rows) -> float | None:
    """The share of its teacher's rows that a student drew; None where each seed has rows of its own."""
    if student.source.draw is not None or student.settings.data.on_policy:
        return None
    count = lambda: sum(part["kept"] for part in rows.summaries(context.store)) or len(rows.read(context.store))  # noqa: E731
    wanted = student.settings.data.rows
    return 1.0 if wanted is None else min(1.0, wanted / context.remember(("kept", rows.key), count))


def _students(whose: Source | Writer) -> dict[str, str]:
    """Which students stood in for the teacher, if any did."""
    return {} if whose.parent is None else {"students": whose.parent.group}


def _audits(graph: Graph, store: Store) -> Iterator[dict[str, Any]]:
    """The means of every audit, under whose rows and which arm they are."""
    for (source, arm), output in graph.audits.items():
        whose = {"teacher": source.teacher, "data": source.dataset, "draw": source.draw, "variant": arm}
        summary = store.summary(output)
        top = {key: summary.get(key) for key in ("top_divergence", "divergence_share")}
        yield from (whose | line | top for line in read_table(store.path(output) / "means.parquet"))


def _together(rows: Mapping[K, Rows], store: Store) -> dict[K, list[dict[str, Any]]]:
    """What is kept of each set's parts: all draws of a writer or source together, and all seeds of the students that wrote them."""
    parts: dict[K, list[dict[str, Any]]] = {}
    for whose, part in rows.items():
        parent = None if whose.parent is None else whose.parent._replace(seed=0)
        parts.setdefault(whose._replace(draw=None, parent=parent), []).extend(part.summaries(store))
    return parts


def _added(parts: list[dict[str, Any]]) -> dict[str, Any]:
    asked, kept = (sum(part[key] for part in parts) for key in ("rows", "kept"))
    reasons = dict.fromkeys(reason for part in parts for reason in part["reject"])
    rejected = {reason: sum(part["reject"].get(reason, 0) for part in parts) for reason in reasons}
    logs = [part["log_allowed"] * part["rows"] for part in parts if part.get("log_allowed") is not None]
    share = math.exp(sum(logs) / asked) if logs else None  # a geometric mean over tokens
    together = {"rows": asked, "kept": kept, "pass_rate": kept / asked, "reject": rejected, "allowed_share": share}
    return parts[0] | together


def _devices(graph: Graph, store: Store) -> str:
    """What the models were trained and asked on, as the artifacts say: other processes may have made them, and elsewhere."""
    outputs = [*graph.students.values(), *(output for _, output in graph.evaluations)]
    return ", ".join(dict.fromkeys(read_json(store.file(output, RECORD), {})["device"] for output in outputs))


def _about(context: Context, key: str, started: str) -> dict[str, Any]:
    setup, e = context.setup, context.setup.experiment
    model, (first, seconds) = setup.checkpoint(), _times(e.run_dir, key)
    about: dict[str, Any] = {
        "name": e.name,
        "model": model.lm.name if model.lm else model.name,
        "model_revision": model.lm.origin.commit if model.lm else None,
        "parameters": parameter_count(model.config),
        "model_hash": model.hash,
        "chat_template": model.chat.described if model.chat else "unknown",
        "pack_hash": setup.pack.hash,
        "wording": {"origin": setup.pack.origin, "hash": setup.pack.wording, "said": setup.wording},
        "versions": versions(),
        "config_hash": key,
        "started": first or started,
        "seconds": seconds,
        "command": f"jsublim run {shlex.quote(str(e.run_dir / 'config.yaml'))}",
        "evaluations": {name: setting.model_dump() for name, setting in e.evaluation.settings.items()},
        "config_yaml": e.yaml(),
        "recipe": setup.recipe.model_dump(),
        "draw": e.data.draw,
        "primary": e.evaluation.primary,
    }
    if e.judge is not None and e.judge.server is not None and isinstance(context.judge, ServerJudge):
        spending = context.judge.spending
        spent = about["judge"] = {
            name: getattr(spending, name) for name in ("prompt_tokens", "completion_tokens", "cost")
        }
        context.progress.say(
            f"judge: {spent['prompt_tokens']} + {spent['completion_tokens']} tokens in this call, cost {spent['cost']:.4g}"
        )
    return about


def note_seconds(folder: Path, key: str, started: str, kind: str, seconds: float) -> None:
    """Add a line to the times that a run keeps: how long a call that `started` then worked on something. Planning counts once, so that a call
    that finds everything whole changes nothing. Other processes may add lines of theirs. A line that cannot be written stops nobody."""
    if kind != "plan" or "plan" not in _times(folder, key)[1]:
        with suppress(OSError), (folder / TIMES).open("a", encoding="utf-8") as file:
            file.write(f"{key} {started} {kind} {seconds:.2f}\n")


def _times(folder: Path, key: str) -> tuple[str | None, dict[str, float]]:
    """When a run was begun, and how long each kind of work took in all calls together, those that were interrupted too."""
    path, seconds = folder / TIMES, dict[str, float]()
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = re.findall(rf"^{key} (\S+) (\w+) ([\d.]+)$", text, re.MULTILINE)  # a kill may have cut one
    for _, kind, taken in lines:
        seconds[kind] = round(seconds.get(kind, 0.0) + float(taken), 2)
    return min((started for started, *_ in lines), default=None), seconds


def run_folder(experiment: Config) -> Output:
    """What a process locks that writes into the run's folder."""
    return Output("runs", "", {"folder": str(experiment.run_dir.resolve())})


def claim_folder(experiment: Config, key: str, console: Console) -> None:
    """Write the resolved config into the run's folder; results of another `key` there are moved aside, not overwritten.

    The caller holds the lock of `run_folder`. What killed processes had begun to write there is removed.

    Raises:
      UsageError: as `check_folder`.
    """
    check_folder(experiment)
    folder, old = experiment.run_dir, _mark(experiment.run_dir)
    for place in (folder, folder / "results"):
        remove_abandoned(place)
    if old is not None and old != key and (moved := _move_aside(folder, old)):
        console.print(f"{folder}: the config has changed; earlier results are kept as {', '.join(moved)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MARK, key + "\n")  # first: whatever else is there is a run's, also after a kill
    write_text(folder / "config.yaml", experiment.yaml())


def check_folder(experiment: Config) -> None:
    """Touch nothing in a folder that is not a run's. Raises UsageError: the folder has no mark of a run, and holds
    more than the store."""
    folder = experiment.run_dir
    if _mark(folder) is None and (foreign := _foreign(folder, experiment.store_dir)):
        raise UsageError(
            f"out: {folder} holds what no run has made ({', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}); "
            f"give a folder of its own, such as out={folder / experiment.name}"
        )


def _mark(folder: Path) -> str | None:
    """The key of the run whose folder it is; None where no run has said so."""
    mark = folder / MARK
    key = mark.read_text(encoding="utf-8", errors="replace").strip() if mark.is_file() else ""
    return key if re.fullmatch("[0-9a-f]{12}", key) else None


def _foreign(folder: Path, store: Path) -> list[str]:
    """The names in a folder that are neither scratch files nor the store, which another run may have begun."""
    if not folder.exists():
        return []
    places = [path.resolve() for path in (store, *store.parents)]
    return sorted(p.name for p in folder.iterdir() if p.suffix != PARTIAL and p.resolve() not in places)


def _move_aside(folder: Path, old: str) -> list[str]:
    """Give what a run of key `old` has left names of its own, all with the same number; returns them."""
    parts = [path for name in ("config.yaml", "results", "report.html") if (path := folder / name).exists()]

    def aside(path: Path, number: int) -> Path:
        return path.with_name(f"{path.stem}.{old}{f'-{number}' if number > 1 else ''}{path.suffix}")

    free = next(n for n in itertools.count(1) if not any(aside(path, n).exists() for path in parts))
    return [path.rename(aside(path, free)).name for path in parts]


def is_reported(experiment: Config, key: str) -> bool:
    """Whether the run's folder holds the report of this very config: every answer and every judgement is there."""
    return _mark(experiment.run_dir) == key and (experiment.run_dir / "report.html").exists()
