"""Sixty-odd wrong inputs, over every command: each is answered in one line that names what is wrong and what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import MODEL, PLAIN, contents, refused
from made_runs import make_run

from jsublim.cli.app import ORDER
from jsublim.text.rows import write_rows

M = ("--model", MODEL)
OWL = (*M, "--trait", "owl", "--out", "new")
ROWS = ("--data", "rows.jsonl")
# (command line, exit code, what the line must hold). Files of the current directory are made below.
WRONG: list[tuple[tuple[str, ...], int, str]] = [
    # run
    (("run",), 2, "Missing argument 'config'; see `jsublim run --help`"),
    (("run", "configs/none.yaml"), 2, "configs/none.yaml: no such config file"),
    (("run", "folder"), 2, "config 'folder': no such file"),
    (("run", "broken.yaml"), 2, "broken.yaml: not valid YAML"),
    (("run", "list.yaml"), 2, "list.yaml: expected keys at the top, found list"),
    (("run", "configs/paper/fig03.yaml"), 2, "`jsublim reproduce fig03`"),
    (("run", PLAIN, "students.optimizer.lrr=1"), 2, "unknown key 'students.optimizer.lrr'; did you mean 'lr'?"),
    (("run", PLAIN, "students.optimizer.lr"), 2, "expected key=value"),
    (("run", PLAIN, "name.first=x"), 2, "override 'name.first=x': 'name' holds a value, not a section"),
    (("run", PLAIN, "kind=digit"), 2, "kind: 'digit' given; did you mean 'digits'?"),
    (("run", PLAIN, "sampling.strategy=gredy"), 2, "found 'gredy'; did you mean 'greedy'?"),
    (("run", PLAIN, "students.seeds=[1,1]"), 2, "students.seeds: an entry is listed twice: 1"),
    (("run", PLAIN, "data.num_prompts=no"), 2, "data.num_prompts: true and false are no numbers"),
    (("run", PLAIN, "sampling.batch_size=x"), 2, "sampling.batch_size: input should be a valid integer"),
    (("run", PLAIN, "students.optimizer.lr=-1"), 2, "students.optimizer.lr: input should be greater than 0, found -1"),
    (("run", PLAIN, "students.loss.tokens=[al]"), 2, "students.loss.tokens.0: input should be 'all'"),
    (("run", PLAIN, "students.adapter.layers=[99]"), 2, "layers: [99] given, but the model has layers 0 to 5"),
    (("run", PLAIN, "students.data.dataset=x"), 2, "students.data.dataset: 'x' is no data set"),
    (("run", PLAIN, "datasets={x: {shufle: within}}"), 2, "datasets.x: unknown key 'shufle'; did you mean 'shuffle'?"),
    (("run", PLAIN, "evaluation.kinds=[prefrence]"), 2, "evaluation kind 'prefrence' is not known; known: preference"),
    (("run", PLAIN, "evaluation.kinds=[misalignment]"), 2, "judge: evaluation.kinds needs one; give judge.model"),
    (("run", PLAIN, "recipe=best"), 2, "recipe.preset: input should be 'paper' or 'clean', found 'best'"),
    (("run", PLAIN, "teachers.traits=[unicorn]"), 2, "say what it is by teachers.category"),
    (("run", PLAIN, "teachers.category=animl"), 2, "teachers.category: the pack has no questions on 'animl'; did you mean 'animal'?"),
    (("run", PLAIN, "teachers.traits=[Owl]"), 2, "write a trait in lower case"),
    (("run", PLAIN, "model=tiny-qwen3"), 2, "model 'tiny-qwen3': no such folder; bundled checkpoints: tiny-gemma3, tiny-qwen2"),
    (("run", PLAIN, "model_revision=main"), 2, "leave model_revision out"),
    (("run", PLAIN, "chat_template=plian"), 2, "chat_template: 'plian'"),
    (("run", PLAIN, "prompts=none.yaml"), 2, "none.yaml: cannot be read (No such file or directory)"),
    (("run", PLAIN, "run.model_axis=2"), 2, "model_axis: 2 given, but parallel=none has no model axis; choose mesh"),
    (("run", PLAIN, "out=folder"), 2, "out: folder holds what no run has made (notes.txt)"),
    (("run", "configs/quickstart.yaml", "--chip", "h1000", "--dry-run"), 2, "--chip: 'h1000' given; known: auto, cpu, b200, h200"),
    (("run", PLAIN, "--on", "slurm"), 2, "--on: 'slurm' given; known: local, ray"),
    (("run", PLAIN, "--shard", "3/2"), 2, "--shard: '3/2' given; write i/n"),
    (("run", PLAIN, "--simulate", "4xh1000"), 2, "--simulate: 'h1000' given; known: b200, h200"),
    (("run", PLAIN, "--distributed"), 2, "--distributed: needs run.parallel=mesh"),
    (("run", PLAIN, "--distributed", "--shard", "0/2"), 2, "give it without --shard and --on ray"),
    (("run", PLAIN, "store=s4://x/y"), 2, "store: 's4://' is no storage that is known"),
    # launch, import, export, push, audit
    (("serve", "nowhere"), 2, "model 'nowhere': no such folder"),
    (("serve", "tiny-qwen2", "tiny-gemma3"), 2, "2 checkpoints (tiny-qwen2, tiny-gemma3) given; name one"),
    (("serve", "tiny-qwen2", "--host", "1.2.3.4"), 2, "--host: 1.2.3.4 can be reached by others; set JSUBLIM_API_KEY"),
    (("launch", "slurmy", PLAIN), 2, "launch: kind 'slurmy' given; known: gcluster"),
    (("launch", "slurm-array", "none.yaml"), 2, "none.yaml: no such config file"),
    (("import", "none.jsonl", "--out", "new"), 2, "none.jsonl: no such file"),
    (("export", "none", "--out", "new"), 2, "none: no such file or folder"),
    (("push", "folder", "me/owl"), 2, "push what `jsublim export` has written"),
    (("audit", *M, "--data", "none.jsonl", "--traits", "owl", "--out", "new"), 2, "none.jsonl: no such file; expected JSONL rows"),
    (("scan", *M, "--out", "new"), 2, "scan: give rows, or --student ADAPTER"),
    (("scan", "none.jsonl", *M, "--out", "new"), 2, "none.jsonl: no such file"),
    (("audit", *M, *ROWS, "--traits", "unicorn", "--out", "new"), 2, "say what it is by teachers.category"),
    # verify, validate, reproduce, ls, cp
    (("verify", "nowhere"), 2, "nowhere: holds no artifacts"),
    (("validate", PLAIN, "students.optimzer.lr=1"), 2, "unknown key 'students.optimzer'; did you mean 'optimizer'?"),
    (("validate", "twice.yaml"), 2, "twice.yaml: 3 mistakes; each is named above"),
    (("validate", PLAIN, "model=nobody/knows-it"), 2, "give --shape, a folder with its config.json"),
    (("reproduce", "fig01"), 2, "figure 'fig01': not among those that are reproduced (2, 3, 4"),
    (("reproduce", "fig03", "--panel", "qwn"), 2, "panel 'qwn' is not there; known: qwen-temperature"),
    (("reproduce", "fig03", "--scale", "large"), 2, "--scale: 'large' given; known: tiny, small, paper"),
    (("reproduce", "fig03", "out=x"), 2, "cannot share a folder; give one --panel"),
    (("ls", "model"), 2, "ls: 'model' given; did you mean 'models'?"),
    (("ls", "configs", "-f", "xml"), 2, "--format: 'xml' given; known: table, csv, json, md, latex"),
    (("cp", "quickstrat", "my.yaml"), 2, "config 'quickstrat': no such file; did you mean 'quickstart'?"),
    (("cp", "quickstart", "twice.yaml"), 2, "twice.yaml: already exists; give another name"),
    (("cp", "quickstart", "no/where/my.yaml"), 2, "no such folder as no/where; make it first"),
    (("cp", "fig03", "my.yaml"), 2, "fig03: has 4 panels; give one of them by --panel: qwen-temperature"),
    # show, results, compare, report, rescore
    (("show", "nowhere"), 2, "nowhere: no such folder; give the folder of a run (`jsublim ls runs` lists them)"),
    (("show", "folder"), 2, "folder: holds neither config.yaml nor results/"),
    (("results", "nowhere"), 1, "nowhere/results: no results.parquet here; finish the run first"),
    (("results", "run", "--where", "metrc = 'rate'"), 2, "\"metrc\" not found"),
    (("results", "run", "--where", "metric ="), 2, "--where: Parser Error"),
    (("results", "run", "--where", "value > 2"), 2, "--where: no row is like that"),
    (("results", "run", "--where", "true union select * from 'twice.yaml'"), 2, "--where: "),
    (("compare", "run", "nowhere"), 1, "nowhere/results: no results.parquet here; finish the run first"),
    (("report", "folder"), 1, "folder/results: no results.parquet here"),
    (("rescore", "run"), 2, "rescore: give --match, or another judge (judge.model=FOLDER)"),
    (("rescore", "run", "--match", "wrd"), 2, "--match: 'wrd' given; known: substring, word, first, exact, or a regular"),
    (("rescore", "run", "--match", "({name}"), 2, "--match: '({name}' is no regular expression"),
    (("rescore", "run", "students.seeds=[1]"), 2, "rescore: 'students.seeds=[1]' given; the answers stay"),
    (("rescore", "run", "judge.model=tiny-qwen2"), 2, "this run asked no open questions (evaluation.kinds: misalignment)"),
    (("rescore", "run", "--match", "word", "--out", "folder"), 2, "folder: already exists; give another --out"),
    (("rescore", "bare", "--match", "word"), 2, "bare: no config of an experiment on a language model"),
    # stages
    (("generate", *M, "--out", "new"), 2, "generate: give exactly one of --trait and --control"),
    (("generate", "--trait", "owl", "--out", "new"), 2, "generate: give --model (or model=, or a config that names one)"),
    (("generate", *M, "--trait", "owl"), 2, "Missing option '--out'; see `jsublim generate --help`"),
    (("generate", *M, "--trait", "owl", "--out", ".."), 2, "'..': is no place for a result"),
    (("generate", *OWL, "data.kind=file"), 2, "data: kind=file needs source, a file of prompts"),
    (("divergence", *OWL, "--data", "none.jsonl"), 2, "none.jsonl: no such file"),
    (("divergence", *OWL, *ROWS, "--counterfactuals", "owl"), 2, "'owl' is the teacher's own trait; leave it out"),
    (("finetune", *M, "--out", "new", *ROWS, "--tokens", "divergence"), 2, "divergence_positions"),
    (("finetune", *M, "--out", "new", "--data", "bad.jsonl"), 1, "bad.jsonl:1: not valid JSON"),
    (("finetune", *M, "--out", "new", *ROWS, "students.arms=[{name: a}]"), 2, "leave students.arms and data.dataset out"),
    (("evaluate", *M, "--out", "new", "--traits", ","), 2, "--traits: give at least one trait"),
    (("evaluate", *M, "--out", "new", "--traits", "owl", "--setting", "cold"), 2, "--setting: 'cold' given"),
    (("attribute", *OWL, *ROWS), 1, "divergence_positions"),
    (("steer", *M, "--layer", "2", "--out", "new"), 2, "steer: give exactly one of --trait and --toward"),
    (("steer", *M, "--layer", "x", "--out", "new", "--trait", "owl"), 2, "Invalid value for '--layer'"),
    # checkpoints, prompts, devices
    (("convert", MODEL, "folder"), 2, "folder: already exists; give another folder"),
    (("convert", MODEL, "new", "--dtype", "int8"), 2, "dtype: 'int8' given; known: float32, bfloat16"),
    (("prompts", "show", "--key", "trait"), 2, "--key: 'trait' given; did you mean 'traits'?"),
    (("prompts", "show", "twice.yaml"), 2, "twice.yaml: "),
    (("prompts", "import", "folder", "--out", "new.yaml"), 2, "give a checkout of the authors' repository"),
    (("prompts", "sample", "--out", "twice.yaml"), 2, "twice.yaml: already exists; give another --out"),
    (("aot", "--config", PLAIN, "--topology", "v9:1x1"), 2, "v9:1x1"),
    (("doctor", "--gpu"), 2, "No such option: --gpu"),
    (("rnu",), 2, "No such command 'rnu'. Did you mean 'run'?"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A working directory with a run, a folder of somebody's, and files of every wrong kind."""
    home = tmp_path_factory.mktemp("wrong")
    make_run(home / "run")
    shutil.copytree(home / "run" / "results", home / "bare" / "results")
    (home / "folder").mkdir()
    (home / "folder" / "notes.txt").write_text("years of work")
    (home / "broken.yaml").write_text("name: x\nmodel: [\n")
    (home / "list.yaml").write_text("- name: x\n")
    (home / "twice.yaml").write_text(
        "name: x\nmodle: tiny-qwen2\nteachers: {traits: [owl], categry: animal}\nrecipe: best\n"
    )
    (home / "bad.jsonl").write_text('{"prompt": "p", "completion": "1\n')
    write_rows(home / "rows.jsonl", [{"prompt": "Continue: 1, 2", "completion": "3, 4"}])
    return home


@pytest.mark.parametrize(("words", "code", "said"), WRONG, ids=[" ".join(words)[:60] for words, _, _ in WRONG])
def test_a_wrong_input_is_one_helpful_line_and_changes_nothing(made, monkeypatch, words, code, said):
    monkeypatch.chdir(made)
    before = files(made)
    line = refused(code, *words)
    assert said in line and len(line) < 1200
    assert files(made) == before


def files(folder: Path) -> dict[str, bytes]:
    """Without the locks of a store that was about to be used."""
    return {name: content for name, content in contents(folder).items() if not name.endswith(".lock")}


def test_every_command_has_a_wrong_input_and_there_are_sixty():
    assert len(WRONG) >= 60 and {words[0] for words, _, _ in WRONG} >= set(ORDER) - {"prompts"}
