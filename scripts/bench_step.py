"""Speed of the training step: tokens per second against the number of students in a program, and against the layers trained.

    python scripts/bench_step.py --model tiny-qwen2
    python scripts/bench_step.py --model Qwen/Qwen2.5-1.5B-Instruct --dtype bfloat16 --rows 10 --tokens 160 --peak-tflops 989

Rows are random tokens of one length, so the numbers are of the program alone. Each line is the median of some steps
after a warm-up; `useful` is `cost.training_flops` over the time, `ratio` that over the stated peak.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from jsublim.distill.arm import Settings
from jsublim.distill.batches import Shape, collate
from jsublim.distill.cost import training_flops
from jsublim.distill.data import Example
from jsublim.distill.losses import Loss
from jsublim.distill.memory import bytes_needed
from jsublim.distill.step import Arms, Program, compile_step, init_state
from jsublim.inference.lm import LanguageModel, load_model
from jsublim.models.lora import Adapter, init_full, init_lora, stack_adapters
from jsublim.models.parallel import Layout


def row(lm: LanguageModel, tokens: int, supervised: int, seed: int, soft: bool) -> Example:
    """Random tokens of which the last are supervised, as those of an answer are."""
    drawn = np.random.default_rng(seed).integers(0, lm.config.vocab_size, tokens + 1).astype(np.int32)
    where = np.arange(tokens - supervised, tokens, dtype=np.int32)
    teacher = {"teacher_tokens": drawn[:-1], "teacher_where": where} if soft else {}
    return Example(drawn[:-1], where, drawn[where + 1], np.ones(supervised, np.float32), **teacher)


def measure(
    lm: LanguageModel, starts: list[Adapter], settings: Settings, tokens: int, supervised: int, repeat: int
) -> dict:
    """Median seconds of a step of these students, and what follows from them."""
    count, soft = settings.batch_size * settings.accumulate, settings.program.loss.soft
    rows = [row(lm, tokens, supervised, i, soft) for i in range(count)]
    A, layout = len(starts), Layout.fit(settings.parallel, len(starts), model=settings.model_axis)
    shape = Shape.of([rows], settings.accumulate, settings.batch_size).divisible(layout.data)
    one = collate(rows, np.arange(len(rows)), shape)
    state = init_state(stack_adapters(starts), settings.program.optimizer)
    column = lambda value: np.full(A, value, np.float32)  # noqa: E731
    numbers = Arms(column(1e-4), np.full(A, 10**6, np.int32), column(1))
    params = layout.place(lm.params, layout.params_sharding(lm.config))
    state, numbers = (layout.place(x, layout.state_sharding(x)) for x in (state, numbers))
    batch = layout.place_batch({key: np.stack([value] * A) for key, value in one.items()})
    rest = numbers, None
    step = compile_step(lm.config, settings.program, layout)
    begin = time.perf_counter()
    compiled = step.lower(params, state, batch, *rest).compile()
    compiling = time.perf_counter() - begin
    seconds = []
    for _ in range(repeat + 2):
        begin = time.perf_counter()
        state, metrics = compiled(params, state, batch, *rest)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begin)
    median, n = statistics.median(seconds[2:]), len(rows) * A
    useful = n * training_flops(
        lm.config, starts[0], settings.program.loss, tokens=tokens, supervised=supervised,
        teacher_tokens=tokens if soft else 0,
    )  # fmt: skip
    return {
        "arms": A, "seconds": median, "tokens_per_s": n * tokens / median, "useful_tflops": useful / median / 1e12,
        "compile_s": compiling, "gib": bytes_needed(compiled) / 2**30,
    }  # fmt: skip


def main(
    model: Annotated[str, typer.Option()] = "tiny-qwen2",
    dtype: Annotated[str, typer.Option()] = "float32",
    arms: Annotated[str, typer.Option(help="Numbers of students.")] = "1,4,16,64",
    rows: Annotated[int, typer.Option(help="Of a micro-batch.")] = 4,
    micro: Annotated[int, typer.Option(help="Micro-batches per step.")] = 1,
    tokens: Annotated[int, typer.Option(help="Of a row.")] = 128,
    supervised: Annotated[int, typer.Option(help="Of a row's tokens, the last so many.")] = 32,
    rank: Annotated[int, typer.Option()] = 8,
    loss: Annotated[str, typer.Option(help="hard, forward-kl, reverse-kl, js.")] = "hard",
    repeat: Annotated[int, typer.Option(help="Steps timed.")] = 5,
    parallel: Annotated[str, typer.Option()] = "none",
    model_axis: Annotated[int, typer.Option()] = 1,
    remat: Annotated[bool, typer.Option()] = False,
    peak_tflops: Annotated[float | None, typer.Option(help="Of a device.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the numbers.")] = None,
) -> None:
    """Print both tables."""
    lm = load_model(model, dtype, Layout.fit(parallel, 1, model=model_axis))
    settings = Settings(rows, micro, Program(loss=Loss(loss), remat=remat), parallel=parallel, model_axis=model_axis)
    L = lm.config.num_layers

    def lora(layers: tuple[int, ...] | None) -> Adapter:
        return init_lora(lm.config, jax.random.key(0), rank=rank, alpha=float(rank), layers=layers)

    kinds = {
        "LoRA, first layer": [lora((0,))], "LoRA, middle layer": [lora((L // 2,))],
        "LoRA, last layer": [lora((L - 1,))], "LoRA, last third": [lora(tuple(range(L - L // 3, L)))],
        "all weights of the last layer": [init_full(lm.config, lm.params, (L - 1,))],
    }  # fmt: skip
    found = {f"LoRA, all layers, students: {n}": [lora(None)] * int(n) for n in arms.split(",")} | kinds
    table = Table(
        "",
        "s per step",
        "tokens/s",
        "useful TFLOP/s",
        "ratio",
        "GiB",
        "compile s",
        title=f"{lm.name}, {jax.devices()[0].device_kind}",
    )
    numbers = {}
    for name, starts in found.items():
        m = numbers[name] = measure(lm, starts, settings, tokens, supervised, repeat)
        ratio = f"{m['useful_tflops'] / peak_tflops / jax.device_count():.3f}" if peak_tflops else "–"
        table.add_row(
            name, f"{m['seconds']:.4f}", f"{m['tokens_per_s']:,.0f}", f"{m['useful_tflops']:.4f}", ratio, f"{m['gib']:.2f}",
            f"{m['compile_s']:.1f}",
        )  # fmt: skip
    Console(width=120).print(table)
    if out is not None:
        out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
