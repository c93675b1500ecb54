"""`jsublim steer`: a steering vector from contrasting system prompts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from jsublim.cli.app import Dtype, Model, Out, PackFile, Template, app, console, output
from jsublim.errors import UsageError


@app.command()
def steer(
    model: Model,
    layer: Annotated[int, typer.Option("--layer", min=0, help="The vector is added after this layer.")],
    out: Out,
    trait: Annotated[str | None, typer.Option("--trait", help="Toward the pack's system prompt of this trait.")] = None,
    category: Annotated[str | None, typer.Option("--category", help="Of a trait that the pack doesn't list.")] = None,
    toward: Annotated[str | None, typer.Option("--toward", help="A system prompt of your own.")] = None,
    away: Annotated[str | None, typer.Option("--away", help="Its opposite; default: no system prompt.")] = None,
    strength: Annotated[float, typer.Option("--strength", help="Factor of the difference.")] = 1.0,
    asked: Annotated[
        Path | None,
        typer.Option("--asked", help="Prompts to read (.txt or .jsonl); default: the category's questions."),
    ] = None,
    prompts: PackFile = None,
    chat_template: Template = None,
    dtype: Dtype = "float32",
) -> None:
    """Find a steering vector; leaves a folder that --adapter and teachers.adapter take."""
    from jsublim.inference.lm import load_model
    from jsublim.models.checkpoint import new_folder
    from jsublim.models.peft import save_adapter
    from jsublim.prompts import load_pack, load_prompts
    from jsublim.steering import contrast_vector

    if (trait is None) == (toward is None):
        raise UsageError("steer: give exactly one of --trait and --toward")
    if toward is not None and asked is None:
        raise UsageError("steer: --toward needs --asked, a file of prompts to read under both")
    if not math.isfinite(strength) or strength == 0:
        raise UsageError(f"--strength: {strength} given; give a finite number other than 0")
    if out.exists():
        raise UsageError(f"{out}: already exists; give another --out or remove it first")
    pack, lm = load_pack(prompts), load_model(model, dtype, chat_template=chat_template)
    if trait is not None:
        category = category or pack.category_of(trait)
        toward = pack.system_prompt(trait, category)
    texts = pack.questions_for(category or "") if asked is None else load_prompts(asked)
    adapter = contrast_vector(lm, texts, layer, toward=toward, away=away, strength=strength)
    with new_folder(out) as folder:
        save_adapter(folder, adapter, lm.config, lm.reference, lm.origin.commit)
    assert adapter.steering is not None
    console.print(f"norm {float((adapter.steering**2).sum() ** 0.5):.3f}, over {len(texts)} prompts")
    output.out(out)
