"""A hook of mkdocs: pages of the site that do not lie in docs/.

The README and its neighbours become pages, and each room of the package has one, made from its docstrings (nothing is imported).
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md"} | {
    name: name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
}
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?://)([^)#\s]*)(#[^)]*)?\)")
PUBLIC = """# Python

What `import jsublim` gives; everything else is in the rooms of the package, in the order of [the map](../ARCHITECTURE.md#rooms).

| name | what it is |
| --- | --- |
"""


def on_config(config: Any) -> Any:
    """The rooms' pages are listed last."""
    config["nav"].append({"API": list(api_pages())})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, text in api_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Links as the site needs them: one to a file that is no page of it becomes its plain text."""
    here = Path(page.file.src_uri).parent

    def target(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        if not path:
            return match[0]
        plain = re.sub(r"^(\.\./|docs/)+", "", posixpath.normpath((here / path).as_posix()))
        place = PAGES.get(plain, plain)
        if files.get_file_from_path(place) is None:
            return text
        return f"[{text}]({posixpath.relpath(place, here.as_posix())}{anchor})"

    return LINK.sub(target, markdown)


def api_pages() -> dict[str, str]:
    """A page per room of the package, by its place in the site."""
    package, found = ROOT / "jsublim", {"api/index.md": PUBLIC + "\n".join(_public()) + "\n"}
    for room in sorted(package.iterdir()):
        if room.is_dir() and (room / "__init__.py").is_file():
            modules = [_module(path) for path in sorted(room.rglob("*.py")) if path.name != "__init__.py"]
        elif room.suffix == ".py" and not room.stem.startswith("__"):
            modules = [_module(room)]
        else:
            continue
        text = "\n\n".join(f"::: {name}" for name in modules)
        found[f"api/{room.stem}.md"] = f"# jsublim.{room.stem}\n\n{text}\n"
    return found


def _public() -> Iterator[str]:
    """A line for each name that the package exports, out of the table of their homes in its `__init__.py`."""
    tree = ast.parse((ROOT / "jsublim" / "__init__.py").read_text(encoding="utf-8"))
    homes = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "_HOMES"
    )
    for name, home in sorted((name, home) for home, names in homes.items() for name in names):
        body = ast.parse((ROOT / home.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")).body
        found = next(node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name)
        said = " ".join((ast.get_docstring(found) or "").split("\n\n")[0].split())
        yield f"| [`{name}`][{home}.{name}] | {said} |"


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)
