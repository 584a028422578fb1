"""Files that docs/architecture.md and CONTRIBUTING.md name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorafx.pass_order import DYNAMO_PASSES, GRAPH_PASSES, LOWERING_PASSES, MODEL_PASSES

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


ORDER = (MODEL_PASSES, DYNAMO_PASSES, GRAPH_PASSES, LOWERING_PASSES)
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
    optional = [item.name for item in GRAPH_PASSES[proved:] if not item.required]
    assert said == optional


def test_architecture_has_the_passes_in_their_order() -> None:
    picture = section("docs/architecture.md", "```\nthe model", "\n```\n")
    *listed, last = (line.partition(" ─▶ ")[2].split(" ▶ ") for line in picture.splitlines())
    assert (listed, last) == ([MODEL, DYNAMO, GRAPH, LOWERING], ["executable"])
    rows = section("docs/architecture.md", "## On the graph", "\n## ")
    assert re.findall(r"^\| (\w+) \|", rows, re.M)[1:] == [*DYNAMO, *GRAPH, *LOWERING]
