"""From what a config says of students to arms that the trainer takes, and from those to artifacts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jsublim.config import Recipe, Students
from jsublim.core.progress import Tick, no_tick
from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Fork, Order, Shape, lengths_of
from jsublim.distill.data import Example, draw_indices, make_examples
from jsublim.distill.loggers import NOWHERE, Logs
from jsublim.distill.losses import Loss
from jsublim.distill.optimizer import Optimizer
from jsublim.distill.rollout import student_rollout
from jsublim.distill.selection import Selection
from jsublim.distill.step import Program
from jsublim.distill.trainer import forget_state, train
from jsublim.errors import UsageError
from jsublim.inference.divergence import PositionSubset, check_counted
from jsublim.inference.lm import LanguageModel
from jsublim.inference.scoring import Targets
from jsublim.inference.teachers import Teacher
from jsublim.models.checkpoint import write_checkpoint
from jsublim.models.config import ModelConfig
from jsublim.models.decoder import Params
from jsublim.models.layers import check_attention
from jsublim.models.lora import Adapter, check_ends, check_layers, init_full, init_lora, init_steering, merge_full
from jsublim.models.parallel import Layout
from jsublim.models.peft import load_adapter, save_adapter
from jsublim.pipeline.arms import total_steps
from jsublim.pipeline.store import Artifact
from jsublim.runtime.processes import on_main_process
from jsublim.text.chat import Turn
from jsublim.text.rows import Row, read_rows, write_rows


@dataclass(frozen=True)
class TrainingData:
    """Rows, tokenized as a student reads them, and for soft losses what the teacher says of them.

    Attributes:
      source: where the rows come from, for errors.
      teacher, teacher_turns: a live teacher, and the rows as it reads them; targets: what a stored one said.
    """

    rows: Sequence[Row]
    turns: Sequence[Turn]
    source: str = "rows"
    teacher: Teacher | None = None
    teacher_turns: Sequence[Turn] | None = None
    targets: Sequence[Targets] | None = None


def start_adapter(config: ModelConfig, params: Params, students: Students, seed: int) -> Adapter:
    """The adapter that a student of this seed begins with.

    Raises:
      UsageError, JsublimError: layers or ends that the model hasn't, an adapter that cannot be read.
    """
    how = students.adapter
    layers = None if how.layers is None else tuple(how.layers)
    if how.init is not None:
        return load_adapter(how.init, config)
    if how.method == "full":
        return init_full(config, params, layers, tuple(how.ends))
    if how.method == "steering":
        return init_steering(config, layers)
    return init_lora(
        config,
        jax.random.key(seed),
        rank=how.rank,
        alpha=how.alpha,
        layers=layers,
        projections=tuple(how.projections),
        rslora=how.rslora,
    )


def check_start(config: ModelConfig, dtype: str, students: Students) -> None:
    """Refuse what `start_adapter` would of a model in this dtype, without making anything.

    Raises:
      UsageError, JsublimError: as `start_adapter`.
    """
    how = students.adapter
    if students.runtime.attention != "products":
        check_attention(config, jax.numpy.dtype(dtype))
    if how.init is not None:
        load_adapter(how.init, config)
    elif how.layers != [] or how.method != "full":
        check_layers(config, None if how.layers is None else tuple(how.layers))
    check_ends(config, tuple(how.ends))


def loss_of(students: Students) -> Loss:
    return Loss(students.loss.kind, students.loss.temperature, tuple(students.loss.terms))


def program_of(students: Students, loss_per: str) -> Program:
    """What is compiled into the step of these students."""
    optimizer = students.optimizer
    return Program(
        loss=loss_of(students),
        optimizer=Optimizer(**optimizer.model_dump(exclude={"lr", "warmup", "project_out"})),
        warmup=optimizer.warmup,
        per=loss_per,
        remat=students.runtime.remat,
        unroll=students.runtime.unroll,
        attention=None if students.runtime.attention == "products" else students.runtime.attention,
    )


CACHED_BYTES = 4 * 2**30  # of hidden states that are kept unasked


def caches_below(config: ModelConfig, students: Students, tokens: int = 0) -> bool:
    """Whether the hidden states below a one-layer student's layer are kept, those of `tokens` tokens in all."""
    given, layers = students.runtime.cache_below, students.adapter.layers or []
    # Rows may be new at every step, and what is below steered.
    if students.data.on_policy or students.adapter.frozen_adapter:
        return False
    return keeps_below(config, layers, tokens) if given == "auto" else given


def keeps_below(config: ModelConfig, layers: Sequence[int], tokens: int) -> bool:
    """Whether the hidden states of `tokens` tokens are kept unasked, where these layers are trained: below a single late layer, if
    they fit."""
    late = len(layers) == 1 and 2 * layers[0] >= config.num_layers
    return late and tokens * config.hidden_size * 4 <= CACHED_BYTES


def settings_of(
    config: ModelConfig,
    students: Students,
    recipe: Recipe,
    *,
    parallel: str,
    model_axis: int,
    tokens: int = 0,
    logs: Logs = NOWHERE,
) -> Settings:
    """What students of one program share in training; `tokens` as of `caches_below`."""
    runtime = students.runtime
    return Settings(
        students.data.batch_size,
        students.data.accumulate,
        program_of(students, recipe.loss_per or "tokens"),
        checkpoint_every=runtime.checkpoint_every,
        parallel=parallel,
        model_axis=model_axis,
        cache_below=caches_below(config, students, tokens),
        peak_tflops=runtime.peak_tflops,
        logs=logs,
    )


def shape_of(students: Students, data: Sequence[TrainingData], max_new_tokens: int) -> Shape:
    """A shape with a row per line that every arm on this data fits, whichever rows and tokens it draws: one program for all of
    them."""
    turns = [turn for part in data for turn in part.turns]
    live = [turn for part in data for turn in part.teacher_turns or ()]
    longest = max(min(len(turn.tokens), students.data.max_tokens) for turn in turns)
    labels = max(len(turn.tokens) - turn.header for turn in turns)
    teacher = max((len(turn.tokens) for turn in live), default=0)
    if students.data.on_policy:
        longest = max(longest, max(turn.content for turn in turns) + max_new_tokens)
        teacher = max(teacher, max(turn.content for turn in live) + max_new_tokens)
        labels = max(labels, max_new_tokens)
    return Shape.fit(students.data.accumulate, students.data.batch_size, longest, labels, teacher)


def in_pieces(settings: Settings, shape: Shape, rows: int) -> tuple[Settings, Shape]:
    """The same steps with so many rows computed at one time.

    Raises:
      UsageError: pieces that a step cannot be cut into, or a loss whose micro-batches are its own.
    """
    step = settings.batch_size * settings.accumulate
    if step % rows:
        raise UsageError(f"students.runtime.rows_at_once: {rows} given; it must divide the {step} rows of a step")
    if rows != settings.batch_size and settings.program.per != "tokens":
        raise UsageError(
            f"students.runtime.rows_at_once: {rows} given, and the recipe's loss is of micro-batches of {settings.batch_size} rows; "
            "leave it at auto"
        )
    pieces = {"batch_size": rows, "accumulate": step // rows}
    return replace(settings, **pieces), replace(shape, **pieces)


@dataclass(frozen=True)
class Drawn:
    """What a student of some seed learns from: indices of its rows, those of them that have a loss as examples, and how many
    steps it trains for. After a `fork` come the examples of other rows, which stand behind."""

    rows: list[int]
    examples: list[Example]
    steps: int
    fork: Fork | None = None

    def orders(self, seed: int) -> list[Order]:
        """In which order it takes them."""
        lengths = lengths_of(self.examples)
        if self.fork is None:
            return [Order(lengths, seed, self.steps)]
        first, then = lengths[: self.fork.rows], lengths[self.fork.rows :]
        return [Order(first, seed, self.fork.after), Order(then, seed, self.steps - self.fork.after)]

    def forked(self, students: Students, then: Drawn) -> Drawn:
        """The same until a fork, and then the rows of `then`.

        Raises:
          UsageError: training is over before.
        """
        fork = students.fork
        assert fork is not None
        if fork.after >= self.steps:
            raise UsageError(f"students.fork.after: {fork.after} given, and training has {self.steps} steps; lower it")
        fork = Fork(fork.after, len(self.examples), fork.moments)
        return Drawn(self.rows, [*self.examples, *then.examples], self.steps, fork)


def picked(every: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    return [every[i] for i in rows]


def draw(lm: LanguageModel, students: Students, recipe: Recipe, data: TrainingData, *, tokens: str, seed: int) -> Drawn:
    """A student's rows, drawn and masked by its seed.

    Args:
      tokens: which tokens of the rows it learns.

    Raises:
      UsageError, JsublimError: as `make_examples`.
    """
    if tokens != "all":
        check_counted(data.rows, lm.chat, data.source)
    loss, rows = students.loss, draw_indices(len(data.rows), students.data.rows, seed)
    selection = Selection(
        tokens,
        bool(recipe.supervise_header),
        bool(recipe.drop_rows_without_divergence),
        students.data.max_tokens,
        PositionSubset(
            loss.positions,
            loss.positions_share,
            recipe.share_rounding or "stochastic",
            bool(recipe.one_in_both_halves),
        ),
        loss.by_margin and tokens == "divergence",
    )
    soft = data.teacher_turns or data.targets
    soft = None if soft is None else picked(soft, rows)
    drawn, turns = picked(data.rows, rows), picked(data.turns, rows)
    examples = make_examples(drawn, turns, selection, seed, data.source, teacher=soft)
    return Drawn(rows, examples, total_steps(students, len(rows) if recipe.match_steps else len(examples)))


def make_arm(
    lm: LanguageModel,
    students: Students,
    data: TrainingData,
    drawn: Drawn,
    *,
    name: str,
    seed: int,
    max_new_tokens: int,
) -> Arm:
    """One student.

    Args:
      drawn: of those rows, with this seed.
      max_new_tokens: of an on-policy row.
    """
    loss, rollout = students.loss, None
    if students.data.on_policy and data.teacher_turns is not None:
        turns, theirs = picked(data.turns, drawn.rows), picked(data.teacher_turns, drawn.rows)
        rollout = student_rollout(lm, turns, theirs, seed=seed, max_new_tokens=max_new_tokens)
    live = data.teacher if data.teacher_turns else None
    return Arm(
        name,
        drawn.examples,
        start_adapter(lm.config, lm.params, students, seed),
        seed,
        students.optimizer.lr,
        drawn.steps,
        loss.weight,
        loss.terms,
        students.adapter.noise,
        teacher=live.adapter if live else None,
        rollout=rollout,
        fork=drawn.fork,
    )


def train_arms(
    lm: LanguageModel,
    members: Sequence[tuple[Arm, Artifact]],
    settings: Settings,
    work: Path,
    *,
    shape: Shape | None = None,
    tick: Tick = no_tick,
    say: Callable[[str], None],
    on_diverged: Callable[[str], None],
) -> None:
    """Train arms in one program, and leave each as a PEFT folder (or a whole checkpoint) with its `metrics.jsonl`.

    Args:
      work: where the state of the training is kept until all of it is whole.
      tick: counts steps; of a training that goes on, those done before come first.
      say: told of a saved state that is damaged.
      on_diverged: told, before anything is kept, of an arm whose numbers stopped being finite. It is kept as it was before,
        and its mark says so.
    """
    done = 0

    def on_step(step: int) -> None:
        nonlocal done
        tick(step - done)
        done = step

    adapters = train(lm.config, lm.params, [arm for arm, _ in members], settings, work, on_step, shape=shape, say=say)
    whole = [_whole(lm, adapter) for adapter in adapters]
    every = on_main_process(lambda: read_rows(work / "metrics.jsonl", ("arm", "step")))
    lines = {arm.name: [line for line in every if line["arm"] == arm.name] for arm, _ in members}
    diverged: dict[str, str] = {}
    for arm, _ in members:
        last = lines[arm.name][-1]
        if "diverged" in last:
            diverged[arm.name] = f"at step {last['step']} of {arm.steps}: {last['diverged']}"
            on_diverged(f"{arm.name}: diverged {diverged[arm.name]}")

    def keep() -> None:
        for (arm, artifact), student in zip(members, whole, strict=True):
            if artifact.done:
                continue
            steps = [{name: value for name, value in line.items() if name != "arm"} for line in lines[arm.name]]
            write_rows(artifact.path / "metrics.jsonl", steps)
            keep_student(artifact.path, lm, student)
            summary = {"steps": arm.steps, "rows": len(arm.examples), "loss": steps[-1]["loss"]}
            artifact.finish(summary | ({"diverged": diverged[arm.name]} if arm.name in diverged else {}))
        forget_state(work)

    on_main_process(keep)


def _whole(lm: LanguageModel, adapter: Adapter) -> Adapter | Params:
    """An adapter, or the parameters of a fully trained student, on this host whichever devices they were on."""
    if adapter.weights is None and not adapter.ends:
        return adapter
    merged = merge_full(lm.params, adapter)
    return merged if jax.process_count() == 1 else Layout.host(merged)


def keep_student(folder: Path, lm: LanguageModel, student: Adapter | Params) -> None:
    """Into the folder of its artifact: an adapter, or whole parameters as a checkpoint."""
    if not isinstance(student, Adapter):
        dtype = str(lm.params["embed"]["weight"].dtype)
        write_checkpoint(
            folder,
            lm.config,
            student,
            lm.hf_config,
            dtype=dtype,
            tokenizer=lm.folder,
            chat_template=lm.chat.given_template,
        )
        return
    for old in folder.glob("*.safetensors"):  # of a call that was stopped before the folder was whole
        old.unlink()
    save_adapter(folder, student, lm.config, lm.reference, lm.origin.commit)
