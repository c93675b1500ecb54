"""Commands about whole experiments, checkpoints and prompt packs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jsublim.cli.app import Chip, DryRun, Json, PackFile, Template, app, console, named, output, prompts_app
from jsublim.cli.showing import say_result
from jsublim.cli.together import Distributed
from jsublim.cli.validating import read_checked, say_what_it_takes
from jsublim.cli.where import On, Preempt, Price, RayAddress, Shard, Simulate, run_where
from jsublim.errors import UsageError


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="YAML, such as configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields of the config: students.optimizer.lr=1e-3 model=/path.")
    ] = None,
    dry_run: DryRun = False,
    chip: Chip = "h100",
    distributed: Distributed = False,
    on: On = "local",
    ray_address: RayAddress = None,
    shard: Shard = None,
    simulate: Simulate = None,
    preempt_per_hour: Preempt = 0.0,
    price: Price = None,
    as_json: Json = False,
) -> None:
    """Run an experiment: generate, find divergence tokens, distil, evaluate, report. Run again, it continues."""
    from jsublim.config import Experiment

    if dry_run:
        say_what_it_takes(config, overrides, chip, None, as_json)
        return
    experiment = read_checked(config, overrides)
    if isinstance(experiment, Experiment):
        if simulate is None:
            run_where([experiment], distributed, on, ray_address, shard, as_json=as_json)
        else:
            from jsublim.cli.forecast import print_simulation

            print_simulation([experiment], simulate, preempt_per_hour, price)
    elif distributed or on != "local" or shard is not None or simulate is not None:
        raise UsageError(
            "--distributed, --on, --shard, --simulate: a digits experiment is one program that takes half a minute; leave them out"
        )
    else:
        from jsublim.digits.config import Digits
        from jsublim.digits.run import run_digits

        assert isinstance(experiment, Digits)
        say_result(run_digits(experiment, console), as_json)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    full: Annotated[bool, typer.Option("--full", help="Print everything, trait by trait.")] = False,
) -> None:
    """Write a run's report again from its results, and print its verdicts."""
    from jsublim.report.tables import run_kind

    if run_kind(run_dir) == "digits":
        from jsublim.digits.report import print_summary, write_report
    else:
        from jsublim.report.html import write_report
        from jsublim.report.terminal import print_summary

    path = write_report(run_dir)
    print_summary(run_dir, console, full)
    output.out(path)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, bundled name, or owner/name of the hub.")],
    out: Annotated[Path, typer.Argument(callback=named, help="The folder to write.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32 or bfloat16; default: the checkpoint's.")
    ] = None,
    chat_template: Template = None,
) -> None:
    """Write a checkpoint as an ordinary Hugging Face folder, text model only, in a dtype of your choice."""
    from jsublim.inference.lm import load_model, resolve_checkpoint
    from jsublim.models.checkpoint import read_config, save_checkpoint

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: already exists; give another folder or remove it first")
    if dtype is None:
        values = read_config(resolve_checkpoint(model))[0]
        dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    lm = load_model(model, dtype, chat_template=chat_template)
    save_checkpoint(
        out, lm.config, lm.params, lm.hf_config, dtype=dtype, tokenizer=lm.folder, chat_template=lm.chat.given_template
    )
    output.out(out)


@prompts_app.command("import")
def prompts_import(
    checkout: Annotated[Path, typer.Argument(help="A checkout of the authors' repository; nothing in it is run.")],
    out: Annotated[Path, typer.Option("--out", callback=named, help="The pack to write (YAML).")],
) -> None:
    """Read everything that the authors' scripts say to a model out of a checkout of their code."""
    from jsublim.prompts import dump_pack, import_pack

    if out.exists():
        raise UsageError(f"{out}: already exists; give another --out or remove it first")
    dump_pack(import_pack(checkout), out)
    output.out(out)


@prompts_app.command("sample")
def prompts_sample(
    out: Annotated[Path, typer.Option("--out", callback=named, help="JSONL to write, a row with 'prompt' each.")],
    prompts: PackFile = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", min=1)] = 30_000,
    seed: Annotated[int, typer.Option("--seed")] = 42,
) -> None:
    """Write the number prompts of a pack."""
    from jsublim.prompts import load_pack, number_prompts
    from jsublim.rows import write_rows

    if out.exists():
        raise UsageError(f"{out}: already exists; give another --out or remove it first")
    write_rows(out, ({"prompt": prompt} for prompt in number_prompts(load_pack(prompts), num_prompts, seed)))
    output.out(out)
