"""What a step needs on each device, as the compiler says before anything is allocated, and how many arms fit."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from jsublim.distill.arm import Arm, Settings
from jsublim.distill.batches import Shape, collate
from jsublim.distill.data import Example
from jsublim.distill.step import compile_step
from jsublim.distill.trainer import first_state
from jsublim.errors import UsageError
from jsublim.models.config import ModelConfig, projection_shapes
from jsublim.models.decoder import Params, parameter_count
from jsublim.models.parallel import SHARE, Layout, device_bytes


def abstract_step(
    config: ModelConfig, params: Params, arm: Arm, arms: int, settings: Settings, shape: Shape, layout: Layout
):
    """Arguments of the compiled step for `arms` arms like this one: shapes, dtypes and shardings, no arrays.

    Args:
      params: arrays or their shapes.
      arm: its examples only show which fields a batch has.
    """
    shape, dtype = shape.divisible(layout.data), params["embed"]["weight"].dtype
    batch = collate(arm.examples[:1], np.full(shape.rows_per_step, -1), shape)
    state, numbers, teacher = jax.eval_shape(
        lambda of: first_state([dataclasses.replace(arm, **of)] * arms, settings.program),
        {"adapter": arm.adapter, "teacher": arm.teacher},
    )
    if settings.caches(arm):
        batch["below"] = np.zeros((*batch["tokens"].shape, config.hidden_size), dtype)

    def of_arms(leaf: Any) -> jax.ShapeDtypeStruct:
        M, B, *more = leaf.shape
        apart = (layout.data, arms, M, B // layout.data, *more)
        return jax.ShapeDtypeStruct(apart if layout.mode == "pmap" else (arms, *leaf.shape), leaf.dtype)

    def placed(tree: Any) -> Any:
        return layout.shapes(tree, layout.state_sharding(tree))

    batches = jax.tree.map(of_arms, batch)
    return (
        layout.shapes(params, layout.params_sharding(config, str(dtype))),
        placed(state),
        layout.shapes(batches, layout.batch_sharding),
        placed(numbers),
        placed(teacher),
    )


def bytes_needed(compiled: Any) -> int:
    """How many bytes a compiled step takes on each device: arguments, temporaries, and results that take no argument's
    place."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def arms_that_fit(
    config: ModelConfig,
    params: Params,
    arm: Arm,
    settings: Settings,
    shape: Shape,
    *,
    most: int,
    limit: int | None = None,
) -> int:
    """How many arms like this one a program can have, at most `most`.

    The step is compiled for one arm per group of devices and for two; memory grows by equal amounts from there.

    Args:
      limit: bytes per device; None measures it.

    Raises:
      UsageError: not even one fits.
    """
    if limit is None:
        measured = device_bytes()  # None where devices are the CPU: what is free of the host's
        limit = int(SHARE * (measured or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))

    def needed(arms: int) -> int:
        layout = Layout.fit(settings.parallel, arms, model=settings.model_axis)
        arguments = abstract_step(config, params, arm, arms, settings, shape, layout)
        return bytes_needed(compile_step(config, settings.program, layout).lower(*arguments).compile())

    # Under a mesh the arms are spread over devices first, and what fits is counted by whole spreads.
    spread = Layout.fit(settings.parallel, most, model=settings.model_axis).arm
    one = needed(spread)
    if one > limit:
        raise UsageError(
            f"students: one needs {one / 2**30:.2f} GiB on a device, {limit / 2**30:.2f} GiB may be used; lower batch_size, "
            "set remat, or spread the checkpoint with model_axis"
        )
    if most <= spread:
        return most
    more = max(needed(2 * spread) - one, 1)
    return min(most, spread * (1 + (limit - one) // more))


# Fill an accelerator; on a CPU the small pieces of the published setting are faster than large ones.
TOKENS_AT_ONCE = 16_384


def kept_per_token(config: ModelConfig) -> int:
    """How many values a layer keeps of each token for the way back: what its projections put out, and what its two halves begin with."""
    return sum(size for _, size in projection_shapes(config).values()) + 2 * config.hidden_size


def rows_at_once(
    config: ModelConfig, settings: Settings, tokens: int, arms: int, *, itemsize: int, limit: int | None,
    devices: int | None = None,
) -> int:  # fmt: skip
    """How many rows of a step to compute at one time: the step's in as few equal pieces as fill the device and fit.

    Only a mean over tokens may be computed in other pieces than those of the settings: a micro-batch's mean is of its rows.

    Args:
      tokens: of a row.
      arms: how many are computed together.
      itemsize: bytes of a parameter.
      limit: bytes of the device; None on a CPU, where the settings' pieces stay.
      devices: how many there are; None counts them.
    """
    if limit is None or settings.program.per != "tokens":
        return settings.batch_size
    layout = Layout.fit(settings.parallel, arms, devices, model=settings.model_axis)
    # Values, on the devices of one copy of the base.
    free = SHARE * limit * layout.model / itemsize - parameter_count(config)
    held = free / 2 / (config.num_layers * kept_per_token(config))
    most = min(TOKENS_AT_ONCE * layout.model, held) * layout.arm * layout.data / (arms * tokens)
    step = settings.batch_size * settings.accumulate
    return max((rows for rows in range(1, step + 1) if step % rows == 0 and rows <= most), default=1)


def example_like(shape: Shape, *, soft: bool) -> Example:
    """A row of zeros as long as a shape allows, for where only the shape matters."""
    tokens, teacher, labels = (np.zeros(n, np.int32) for n in (shape.tokens, shape.teacher, shape.labels))
    row = Example(tokens, labels, labels, np.zeros(shape.labels, np.float32))
    return dataclasses.replace(row, teacher_tokens=teacher, teacher_where=labels) if soft else row
