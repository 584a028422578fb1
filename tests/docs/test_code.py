"""What README.md and docs/ show in Python runs, and their assertions hold.

The blocks of a page run one after another as one program, in a folder where the first block of
docs/index.md has written its tiny model and adapters. They run in plain aten: what the pages say
does not depend on how LoRA is computed. Two comments of Markdown, which no reader sees, are for
this test:

    <!-- invisible-code-block: python ... -->    stands for what the page takes for granted
    <!-- skip: next "needs a server" -->         the next block cannot run here, and why
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import torch
from peft import PeftModel
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from lorafx import Options

#: Nobody is to learn that from our own examples.
pytestmark = [
    pytest.mark.any_sizes,
    pytest.mark.filterwarnings("error:.* is in training mode:lorafx.LorafxWarning"),
]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Has a test of its own: it makes its models itself, and compiles them as its reader does.
README = ROOT / "README.md"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "```python" in path.read_text()]
#: Guides repeat what other pages show; these pages take a third of all pages' time.
DEAR = {DOCS / "look_inside.md", DOCS / "sums.md"}
RUN = [
    pytest.param(p, marks=[pytest.mark.slow] * (p.parent.name == "guides" or p in DEAR))
    for p in PAGES
]


def run_block(example: Example) -> None:
    """In the namespace of its page, with the lines of the page in tracebacks."""
    source = "\n" * (example.line + example.parsed.line_offset) + example.parsed
    exec(compile(source, example.path, "exec"), example.namespace)


def page(path: Path) -> Document:
    document = Sybil([CodeBlockParser("python", run_block), SkipParser()]).parse(path)
    document.namespace.update(__name__=path.stem)
    return document


def run(document: Document) -> dict[str, Any]:
    """The names that a page's blocks leave."""
    for example in document.examples():
        with suppress(SkipTest):
            example.evaluate()
    return document.namespace


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the first block of the start page has run."""
    folder = tmp_path_factory.mktemp("written")
    first = next(page(DOCS / "index.md").examples())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        first.evaluate()
    return folder


@pytest.fixture
def plain_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Options.lowering` is "reference" where a page does not say another."""
    _, *others = Options.__init__.__defaults__ or ()
    monkeypatch.setattr(Options.__init__, "__defaults__", ("reference", *others))


@pytest.fixture
def own_logging() -> Iterator[None]:
    """What a page does to the level of a logger, or to the handlers of the root, ends with it."""
    loggers = logging.getLogger(), logging.getLogger("lorafx")
    levels, handlers = [log.level for log in loggers], [*loggers[0].handlers]
    yield
    loggers[0].handlers[:] = handlers
    for log, level in zip(loggers, levels, strict=True):
        log.setLevel(level)


@pytest.mark.usefixtures("own_logging")
@pytest.mark.parametrize("start", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", RUN, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_page(
    path: Path,
    start: str,
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plain_aten: None,
    request: Any,
) -> None:
    """As their readers' first calls do, calls run in eager mode, where they ask for no graph."""
    if start == "eager":
        request.getfixturevalue("in_eager_mode")
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run(page(path))


@pytest.mark.quick
@pytest.mark.parametrize("path", [*PAGES, README], ids=lambda path: path.name)
def test_every_python_block_is_run_or_left_out_with_a_reason(path: Path) -> None:
    """Fences that are written in another way would not be found."""
    fences = [line for line in path.read_text().splitlines() if line.lstrip().startswith("```py")]
    document = page(path)
    skips = [e.parsed for e in document.examples() if isinstance(e.parsed, tuple)]
    assert all(action == "next" and reason for action, reason in skips)
    starts = [document.text[e.region.start :].lstrip()[:9] for e in document.examples()]
    assert fences.count("```python") == len(fences) == starts.count("```python")


@pytest.mark.quick
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_first_block_of_a_page_shows_its_set_up(path: Path) -> None:
    """Else it raises NameError for a reader. A guide may say in words what it stands for; layers.md
    begins with lines out of a model's forward."""
    before, _, _ = path.read_text().partition("```python")
    stands_for = path.name == "layers.md" or path.parent.name == "guides"
    assert stands_for or "invisible-code-block" not in before


def test_readme(in_eager_mode: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It needs nothing of the repository, and its rows are what PEFT gives for each alone. As for
    users, the first answers come from eager mode."""
    monkeypatch.chdir(tmp_path)
    made = run(page(README))
    rows = []
    for row, name in enumerate([None, "sql", "chat"]):
        model = made["build_model"]()
        if name is not None:
            model = PeftModel.from_pretrained(model, f"{made['folder']}/{name}")
        prompt = made["prompts"][row : row + 1]
        rows.append(model.generate(input_ids=prompt, max_new_tokens=8))
    assert torch.equal(made["tokens"], torch.cat(rows))
    assert len({tuple(row[0, 5:].tolist()) for row in rows}) == 3
    assert "more" in made["cm"].adapters
