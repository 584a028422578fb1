"""Files that docs/architecture.md and CONTRIBUTING.md name are there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from lorafx.pass_order import (
    AOT_PASSES,
    DYNAMO_PASSES,
    GRAPH_PASSES,
    LOWERING_PASSES,
    MODEL_PASSES,
)

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
FOLDERS = ("lorafx", "passes", "kernels", "tests", "docs", "examples", "benchmarks")
NAME = re.compile(r"`([\w./-]+\.(?:py|cpp|h|js|patch|jinja))`")


def added() -> set[str]:
    """The files that patches of examples/commits make."""
    patches = (ROOT / "examples" / "commits").glob("*.patch")
    return {
        name for path in patches for name in re.findall(r"^\+\+\+ b/(.+)$", path.read_text(), re.M)
    }


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_exists(page: str) -> None:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    there = {f"/{path.relative_to(ROOT).as_posix()}" for path in [*paths, *ROOT.glob("*.py")]}
    there |= {f"/{name}" for name in added()}
    named = set(NAME.findall((ROOT / page).read_text()))
    assert len(named) > 20
    lost = {name for name in named if not any(path.endswith(f"/{name}") for path in there)}
    assert not lost


LINES = runpy.run_path(str(ROOT / ".ci" / "lines.py"))
ORDER = (MODEL_PASSES, DYNAMO_PASSES, (*AOT_PASSES, *GRAPH_PASSES), LOWERING_PASSES)
MODEL, DYNAMO, GRAPH, LOWERING = ([item.name for item in passes] for passes in ORDER)


def section(page: str, start: str, end: str) -> str:
    text = (ROOT / page).read_text()
    assert text.count(start) == 1
    return text.partition(start)[2].partition(end)[0]


def test_architecture_says_which_passes_can_be_switched_off() -> None:
    said = re.findall(
        r"`(\w+)`", section("docs/architecture.md", "From then on the graph is right: ", " only ")
    )
    proved = GRAPH.index("attend")  # what stands before makes the graph right
    passes = (*AOT_PASSES, *GRAPH_PASSES)
    optional = [item.name for item in passes[proved:] if not item.required]
    assert said == optional


def test_architecture_has_the_passes_in_their_order() -> None:
    picture = section("docs/architecture.md", "```\nthe model", "\n```\n")
    *listed, last = (line.partition(" ─▶ ")[2].split(" ▶ ") for line in picture.splitlines())
    assert (listed, last) == ([MODEL, DYNAMO, GRAPH, LOWERING], ["executable"])
    rows = section("docs/architecture.md", "## On the graph", "\n## ")
    assert re.findall(r"^\| (\w+) \|", rows, re.M)[1:] == [*DYNAMO, *GRAPH, *LOWERING]


def test_architecture_has_the_lines_of_the_core_and_of_what_is_built_on_it() -> None:
    lines = LINES["lines_by_folder"]()
    del lines["tests"]
    table = section("docs/architecture.md", "## The core, and what is built on it", "\n`make lint`")
    rows = [row.split(" | ") for row in re.findall(r"^\| (.*`.*) \|$", table, re.M)]
    for _, folders, said in rows:
        names = (name.removesuffix("/*.py") for name in re.findall(r"`([^`]+)`", folders))
        paths = [name if name in lines else f"lorafx/{name}" for name in names]
        count = sum(lines.pop(path) for path in paths)
        assert abs(count - int(said.replace(",", ""))) <= count / 20, f"{folders}: {count}"
    assert not lines


def test_a_folder_over_its_budget_is_told(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setitem(LINES["main"].__globals__, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.lorafx.lines]\n"lorafx/model" = 2\npasses = 1\n'
    )
    for folder in ("lorafx/model", "passes"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("a\nb\n")
    (tmp_path / "lorafx" / "passes").symlink_to("../passes")
    assert LINES["main"]()
    over = [line for line in capsys.readouterr().out.splitlines() if "over its budget" in line]
    assert [line.split()[:4] for line in over] == [["passes", "2", "of", "1"]]


def test_a_long_module_says_why(monkeypatch, tmp_path) -> None:
    assert not LINES["unexplained"]()
    monkeypatch.setitem(LINES["main"].__globals__, "ROOT", tmp_path)
    (tmp_path / "passes").mkdir()
    for name, heading in (("a", "A pass."), ("b", "A pass.\n\nOne file: one table.")):
        text = f'"""{heading}"""\n' + "x = 1\n" * LINES["LONGEST"]
        (tmp_path / "passes" / f"{name}.py").write_text(text)
    assert LINES["unexplained"]() == ["passes/a.py"]
