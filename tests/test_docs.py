"""What the documents say can be done: their configs and commands are valid, their links lead somewhere, their tables are whole,
and the rooms of the map are in the order in which they import one another."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from command import PLAIN, ROOT
from paper_map import claims_table, figure_table

from jsublim.cli.app import app
from jsublim.cli.stages import StageOptions
from jsublim.config import Experiment, Recipe, check_config, read_config
from jsublim.config.figures import SCALES, load_question, panel_experiment, questions
from jsublim.core.section import overlaid
from jsublim.digits.config import Digits
from jsublim.report.claims import CLAIMS

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALL = [*DOCUMENTS, *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"))]
# What a block that shows single sections is laid over.
REST = {"name": "shown", "model": "tiny-qwen2", "teachers": {"traits": ["owl"]}}


def _blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        texts = re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        found += [(f"{path.name}, {language} block {i}", text) for i, text in enumerate(texts, 1)]
    return found


def test_the_deviations_of_every_figures_file_are_told():
    text = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
    table = text.split("## Where the panels deviate")[1].split("## Claims")[0]
    assert set(re.findall(r"^\| `(fig\d+)`", table, re.MULTILINE)) == {path.stem for path, _ in questions()}


@pytest.mark.parametrize(("where", "text"), [pytest.param(*block, id=block[0]) for block in _blocks("yaml")])
def test_a_config_that_is_shown_is_valid(where, text):
    check_config(Experiment, overlaid(REST, yaml.safe_load(text)), where)


def _commands() -> list[list[str]]:
    """Those that are shown whole, without "...", and with a shell's variables filled in."""
    lines = [line.strip() for _, text in _blocks("sh") for line in text.replace("\\\n", " ").splitlines()]
    lines = [re.sub(r"\$\(\(.*?\)\)|\$\w+", "1", line) for line in lines]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("jsublim ") and " ... " not in line]


COMMANDS = [pytest.param(words, id=" ".join(words)) for words in _commands()]
KINDS = {"language": Experiment, "digits": Digits}
STAGES = ("generate", "divergence", "finetune", "evaluate", "attribute")


def _of(*names: str) -> list:
    return [command for command in COMMANDS if command.values[0][1] in names]


def _understood(words: list[str]) -> dict:
    """A command's options and arguments."""
    command, rest = typer.main.get_command(app), words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    return command.make_context(words[0], rest).params


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_that_is_shown_is_understood(words):
    _understood(words)


@pytest.mark.parametrize("words", _of("run", "reproduce", "aot"))
def test_the_fields_that_a_command_gives_are_valid(words):
    given = _understood(words)
    if words[1] == "reproduce":
        path, question = load_question(given["figure"])
        for panel in question.panels:
            panel_experiment(path, question, panel, given["scale"], given["overrides"])
    else:  # a config that is not ours stands for any
        config = given["config"] if given["config"].startswith("configs/") else "configs/quickstart.yaml"
        fields = [field for field in given["overrides"] or [] if "=" in field]
        values = read_config(config.replace("MODEL", "qwen2.5-7b"), fields)
        check_config(KINDS[values.get("kind", "language")], values, config)


@pytest.mark.parametrize("words", _of(*STAGES))
def test_the_fields_that_a_stage_gives_are_valid(words):
    given = _understood(words)
    base = {"teachers": {"traits": ["owl"]}} | ({"attribution": {}} if words[1] == "attribute" else {})
    # A config that is not ours stands for any.
    fields = [PLAIN if "=" not in each and not each.startswith("configs/") else each for each in given["fields"] or []]
    StageOptions(fields=fields, out=Path(given["out"]), model=given["model"]).experiment(words[1], base)


def test_every_page_stands_in_the_sites_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = set(re.findall(r"[\w/.-]+\.md", str(site["nav"])))
    assert {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} <= named
    assert site["strict"] and site["validation"]["nav"]["omitted_files"] == "warn"  # so it is an error


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_links_to_files_lead_to_files(path):
    for target, place in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], place


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_code_that_is_named_is_there(path):
    """Names with a folder, in backticks: `pipeline/rows.py` lies in jsublim/, `configs/digits.yaml` in the project; with a
    function or a class after a colon, it is defined there."""
    names = re.findall(r"`((?:\w+/)+[\w.]+\.(?:py|sh|yaml|md))(?::([\w.]+))?", path.read_text(encoding="utf-8"))
    names += [
        (name, "") for name in re.findall(r"(?:python|bash) (scripts/\w+\.(?:py|sh))", path.read_text(encoding="utf-8"))
    ]
    for name, defined in names:
        file = next((each for each in (ROOT / name, ROOT / "jsublim" / name) if each.is_file()), None)
        assert file is not None, name
        body = ast.parse(file.read_text(encoding="utf-8")).body if defined else []
        for part in filter(None, defined.split(".")):
            found = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
            assert found, f"{name}:{defined}"
            body = found[0].body


def test_the_paths_through_the_code_follow_the_calls():
    """Each function of a path is reached from one above it, or stands on the page of the experiment."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("## Two paths")[1].split("\n## ")[0]
    paths = [re.findall(r"^\| \d+ \| `([^`]+)`", part, re.MULTILINE) for part in text.split("\n\n**")[1:]]
    assert len(paths) == 2 and all(5 < len(path) <= 10 for path in paths)
    calls = _Calls()
    for path in paths:
        for place, name in enumerate(path):
            assert name.startswith("pipeline/experiment.py") or place == 0 or calls.reach(path[:place], name), name


class _Calls:
    """Which functions of the package name which others."""

    def __init__(self) -> None:
        self.named: dict[str, set[str]] = {}  # "file:function", and the names in it
        self.known: dict[str, set[str]] = {}  # of each name, the functions that are called so
        self.imported: dict[tuple[str, str], str] = {}  # what a name means in a file
        for file in sorted((ROOT / "jsublim").rglob("*.py")):
            place = str(file.relative_to(ROOT / "jsublim"))
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    inside = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                    inside |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                    self.named.setdefault(f"{place}:{node.name}", set()).update(inside)
                    self.known.setdefault(node.name, set()).add(f"{place}:{node.name}")
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jsublim."):
                    home = (node.module or "").removeprefix("jsublim.").replace(".", "/")
                    self.imported |= {(place, each.name): f"{home}.py:{each.name}" for each in node.names}

    def follow(self, function: str) -> set[str]:
        """What a function calls: those of its own file, those that are imported, and those whose names nobody else has."""
        place, found = function.split(":")[0], set()
        for name in self.named.get(function, set()):
            here, there = f"{place}:{name}", self.imported.get((place, name), "")
            every = self.known.get(name, set())
            found |= {here} & every or {there} & every or (every if len(every) == 1 else set())
        return found

    def reach(self, begins: list[str], end: str, calls: int = 9) -> bool:
        seen = front = set(begins)
        for _ in range(calls):
            front = {other for each in front for other in self.follow(each)} - seen
            seen = seen | front
        return end in seen


def test_a_room_imports_only_from_rooms_above_it():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.split("## Rooms")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    rooms = [name.rstrip("/").removesuffix(".py") for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    package = ROOT / "jsublim"
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(rooms) == there - {"__init__", "__main__"}
    for place, room in enumerate(rooms):
        files = [package / f"{room}.py"] if (package / f"{room}.py").is_file() else (package / room).rglob("*.py")
        used = {name for file in files for name in _imports(file)} & there
        assert used <= set(rooms[: place + 1]), (room, used - set(rooms[: place + 1]))


def _imports(path: Path) -> set[str]:
    """The rooms that a file imports from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "jsublim":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jsublim."):
            found.add(node.module.split(".")[1])
    return found


def test_the_map_has_every_question_and_the_table_of_panels_is_that_of_the_configs():
    text = _map()
    assert {path.name for path, _ in questions()} == set(
        re.findall(r"^\|[^|]*\| `(fig\d+\.yaml)` \|", text, re.MULTILINE)
    )
    parts = text.split("<!-- begin: scripts/paper_map.py -->\n")[1:]
    tables = [part.split("<!-- end -->")[0] for part in parts]
    assert tables == [figure_table(), claims_table()], "run scripts/paper_map.py"


def test_the_map_names_every_claim_quirk_and_scale():
    sections = re.split(r"^## ", _map(), flags=re.MULTILINE)
    first = {text.splitlines()[0]: re.findall(r"^\| (\S+) \|", text, re.MULTILINE) for text in sections}
    assert first["Claims"] == ["claim", "---", *CLAIMS]
    assert first["Quirks"] == ["n", "---", *map(str, range(1, 26))]
    assert first["How to run"] == ["scale", "---", *(f"`{scale}`" for scale in SCALES)]


def test_workflows_run_scripts_that_are_there():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    run = set(re.findall(r"bash (scripts/\w+\.sh)", text))
    assert run == {f"scripts/{name}.sh" for name in ("test", "test_floor", "test_wheel", "docs")}
    assert all((ROOT / name).is_file() for name in run)


def test_every_field_of_the_recipe_is_explained():
    explained = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in Recipe.model_fields if f"`{name}`" not in explained and name != "preset"] == []


def _map() -> str:
    return (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
