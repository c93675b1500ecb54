"""Commands that bring rows and wording in, and take rows, students, checkpoints and results out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from jsublim.cli.app import PackFile, Template, app, console, must_be_new, output, prompts_app
from jsublim.core.reading import near_or_all
from jsublim.errors import UsageError
from jsublim.text.rows import write_rows


@app.command()
def export(
    what: Annotated[Path, "A student or another adapter, rows (.jsonl), or a run's folder."],
    *,
    out: Annotated[Path, "The folder to write."],
    merged: Annotated[bool, "Of an adapter: a whole checkpoint, the adapter written into its base."] = False,
    inspect: Annotated[bool, "Of a run: its answers as logs of inspect_ai, one for each model."] = False,
    base: Annotated[str | None, "The adapter's base, as others find it; default: as the adapter says."] = None,
    dtype: Annotated[str | None, "With --merged: float32 or bfloat16; default: the base's."] = None,
    chat_template: Template = None,
) -> None:
    """Write a result for others: adapter or checkpoint with a model card, rows as a data set, results as CSV."""
    from jsublim.exchange import results, rows, students

    adapter = what.is_dir() and students.is_adapter(what)
    if merged and not adapter:
        raise UsageError(f"--merged: {what} is no adapter")
    if not what.exists():
        raise UsageError(f"{what}: no such file or folder")
    if inspect:
        from jsublim.exchange.inspect_logs import export_logs

        export_logs(what, out)
    elif rows.is_rows(what):
        rows.export_rows(what, out)
    elif merged:
        students.export_merged(what, out, base, dtype, chat_template)
    elif adapter:
        students.export_adapter(what, out, base)
    elif what.is_dir() and students.is_checkpoint(what):
        students.export_checkpoint(what, out, base)
    elif what.is_dir() and results.tables_of(what):
        results.export_results(what, out)
    else:
        raise UsageError(f"{what}: holds no rows, no adapter, no checkpoint and no results")
    output.out(out)


@app.command("import")
def import_rows(
    source: Annotated[str, "JSONL, JSON, parquet, CSV, a `datasets` folder, or owner/name of the hub."],
    *,
    out: Annotated[Path, "JSONL to write."],
    subset: Annotated[str | None, "Of a data set with several."] = None,
    split: Annotated[str, "Of a data set."] = "train",
    prompt_column: Annotated[str | None, "What the prompt is called."] = None,
    completion_column: Annotated[str | None, "What the completion is called."] = None,
    model: Annotated[str | None, "The checkpoint in whose tokens divergence positions were counted."] = None,
    chat_template: Template = None,
) -> None:
    """Bring rows in from elsewhere (OUT, JSONL): prompt and completion, `messages`, the published code's rows."""
    from jsublim.exchange.rows import import_rows
    from jsublim.inference.lm import load_model

    must_be_new(out)
    if (prompt_column is None) != (completion_column is None):
        raise UsageError("--prompt-column and --completion-column go together")
    columns = None if prompt_column is None or completion_column is None else (prompt_column, completion_column)
    chat = None if model is None else load_model(model, weights=False, chat_template=chat_template).chat
    rows = import_rows(source, subset=subset, split=split, columns=columns, chat=chat)
    write_rows(out, rows)
    others = sorted({key for row in rows for key in row} - {"prompt", "completion"})
    console.print(f"{len(rows)} rows; kept beside prompt and completion: {', '.join(others) or 'nothing'}")
    if chat is None and any("divergence_positions" in row for row in rows):
        console.print("divergence positions are taken as they are; --model says in whose tokens they were counted")
    output.out(out)


@app.command()
def push(
    folder: Annotated[Path, "What `jsublim export` has written."],
    repository: Annotated[str, "On the hub.", {"metavar": "OWNER/NAME"}],
    *,
    public: Annotated[bool, "Make a new repository public; default: private."] = False,
) -> None:
    """Upload an exported folder to the hub. Nothing else of jsublim sends anything there."""
    from jsublim.exchange.hub import push as upload

    if repository.count("/") != 1:
        raise UsageError(f"'{repository}': give OWNER/NAME")
    output.out(upload(folder, repository, public=public))


@app.command()
def convert(
    model: Annotated[str, "Checkpoint folder, bundled name, or owner/name of the hub."],
    out: Annotated[Path, "The folder to write."],
    *,
    dtype: Annotated[str | None, "float32 or bfloat16; default: the checkpoint's."] = None,
    chat_template: Template = None,
) -> None:
    """Write a checkpoint as an ordinary Hugging Face folder, text model only, in a dtype of your choice."""
    from jsublim.inference.lm import load_model, resolve_checkpoint
    from jsublim.models.checkpoint import read_config, save_checkpoint

    if not (out.is_dir() and not any(out.iterdir())):
        must_be_new(out, "give another folder or remove it first")
    if dtype is None:
        values = read_config(resolve_checkpoint(model))[0]
        dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    lm = load_model(model, dtype, chat_template=chat_template)
    template = lm.chat.given_template
    save_checkpoint(out, lm.config, lm.params, lm.hf_config, dtype=dtype, tokenizer=lm.folder, chat_template=template)
    output.out(out)


@prompts_app.command()
def show(
    pack: Annotated[Path | None, "A pack (YAML); default: the package's."] = None,
    *,
    key: Annotated[str | None, "This part alone: questions, traits, system_template ..."] = None,
) -> None:
    """Print a prompt pack with everything that it takes from the default one, as YAML."""
    import yaml

    from jsublim.text.prompts import load_pack

    values = load_pack(pack).model_dump(mode="json")
    if key is not None and key not in values:
        raise UsageError(f"--key: '{key}' given; {near_or_all(key, values)}")
    shown = values if key is None else {key: values[key]}
    output.out(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=110).rstrip("\n"))


@prompts_app.command("import")
def import_wording(
    checkout: Annotated[Path, "A checkout of the authors' repository; nothing in it is run."],
    *,
    out: Annotated[Path, "The pack to write (YAML)."],
) -> None:
    """Read everything that the authors' scripts say to a model out of a checkout of their code."""
    from jsublim.text.prompts import dump_pack, import_pack

    must_be_new(out)
    dump_pack(import_pack(checkout), out)
    output.out(out)


@prompts_app.command()
def sample(
    *,
    out: Annotated[Path, "JSONL to write, a row with 'prompt' each."],
    prompts: PackFile = None,
    num_prompts: Annotated[int, "How many.", {"min": 1}] = 30_000,
    seed: Annotated[int, "Of the draws."] = 42,
) -> None:
    """Write the number prompts of a pack."""
    from jsublim.text.prompts import load_pack, number_prompts

    must_be_new(out)
    write_rows(out, ({"prompt": prompt} for prompt in number_prompts(num_prompts, seed, pack=load_pack(prompts))))
    output.out(out)
