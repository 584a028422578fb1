"""What mkdocs does beside its settings: pages made from files outside docs/, and links to those.

In the repository a page links to `../examples/experts.py` or `../CONTRIBUTING.md`. The site has
both as pages of its own, made here, and links lead there. Names of pages in docstrings
("docs/adapters.md") become links too.
"""

from __future__ import annotations

import ast
import re
from itertools import takewhile
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
#: Folders whose files have a line each, and the kinds of files that do.
SOURCES, TOLD = ("kernels", "lorafx", "passes"), (".py", ".cpp", ".h", ".js")
EXAMPLE = re.compile(r"\]\((?:\.\./)*examples/(?:commits/)?(\w+)(?:\.py|\.cpp|\.patch)?\)")
CONTRIBUTING = re.compile(r"\]\((?:\.\./)+CONTRIBUTING\.md")
#: A page's name in the text that mkdocstrings makes of a docstring, or of lorafx's messages.
PAGE_NAME = re.compile(r"(?<![\w/>\"])docs/(\w+)\.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {
        "examples.md": examples(),
        "sources.md": sources(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "]("),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def examples() -> str:
    """A page of every program in examples/: what it says of itself, then its code."""
    parts = [
        "# Examples",
        "Each of them runs from a checkout, without a download, and is run by the tests.",
    ]
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text()
        tree = ast.parse(source)
        said = (ast.get_docstring(tree) or "").split("\n\n")[0]
        code = "\n".join(source.splitlines()[tree.body[0].end_lineno :]).strip()
        parts.append(f"## {path.stem}\n\n{said}\n\n{shown(path, 'python', code)}")
    for path in sorted((ROOT / "examples").glob("*.cpp")):
        parts.append(f"## {path.stem}\n\n{opening(path)}\n\n{shown(path, 'cpp', path.read_text())}")
    parts += [
        "## commits",
        "Changes to lorafx as the [page for contributors](contributing.md) shows them.",
    ]
    for path in sorted((ROOT / "examples" / "commits").glob("*.patch")):
        parts.append(f"### {path.stem}\n\n{shown(path, 'diff', path.read_text().rstrip())}")
    return "\n\n".join(parts) + "\n"


def sources() -> str:
    """A page of every source file: the first lines of its docstring, or of the comment that it
    opens with."""
    parts = ["# Source files", "What each file says of itself, folder by folder."]
    found = [path for name in SOURCES for path in (ROOT / name).rglob("*") if path.suffix in TOLD]
    for folder in sorted({path.parent for path in found}):
        inside = {path.name: opening(path) for path in sorted(found) if path.parent == folder}
        package = inside.pop("__init__.py", "")
        rows = [f"| `{name}` | {said} |" for name, said in inside.items() if said]
        if package or rows:
            parts.append(f"## {folder.relative_to(ROOT).as_posix()}\n\n{package}")
        if rows:
            parts.append("\n".join(["| file | what it is |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def opening(path: Path) -> str:
    """The first paragraph of what a file says of itself, as a cell of a table."""
    text = path.read_text()
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = takewhile(lambda line: line.startswith("//"), text.splitlines())
        said = "\n".join(line.removeprefix("//").strip() for line in comment)
    return " ".join(said.split("\n\n")[0].split()).replace("|", "\\|")


def shown(path: Path, language: str, code: str) -> str:
    title = path.relative_to(ROOT).as_posix()
    return f'````{language} title="{title}"\n{code}\n````'


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    if page.is_homepage:  # alone in its section: its code gets the room
        page.meta["hide"] = ["navigation"]
    here = Path(page.file.src_uri).parent.as_posix()
    markdown = EXAMPLE.sub(rf"]({relpath('examples.md', here)}#\1)", markdown)
    return CONTRIBUTING.sub(f"]({relpath('contributing.md', here)}", markdown)


def on_page_content(html: str, page: Page, files: Files, **_: Any) -> str:
    def link(found: re.Match[str]) -> str:
        named = files.get_file_from_path(f"{found[1]}.md")
        if named is None:
            return found[0]
        return f'<a href="{named.url_relative_to(page.file)}">{found[0]}</a>'

    return PAGE_NAME.sub(link, html)
