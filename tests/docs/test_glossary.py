"""The glossary of docs/architecture.md, beside names of public classes and the words of docs.

A class whose name ends in a word of the glossary is one of those that the word's row lists, or
derives from one. So a second meaning of a word needs a line that says what it is, or another name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from lorafx.pass_order import AOT_PASSES, DYNAMO_PASSES, GRAPH_PASSES, LOWERING_PASSES, MODEL_PASSES

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
WORDS = (ROOT / "docs/architecture.md").read_text().partition("## Words\n")[2].partition("\n## ")[0]
#: Word -> the classes of its row.
GLOSSARY = {
    word: set(re.findall(r"`(\w+)`", classes))
    for word, classes in re.findall(r"^\| ([a-z ]+) \| .+ \| (.*) \|$", WORDS, re.M)
    if word != "word"
}
NOT_USED = set(re.findall(r"(\w+) \(\w+\)", WORDS.partition("Not used: ")[2]))
#: Passes are named by what they do: `LookUpSlots`, `WriteInPlace`.
PASSES = {
    type(item).__name__
    for passes in (MODEL_PASSES, DYNAMO_PASSES, AOT_PASSES, GRAPH_PASSES, LOWERING_PASSES)
    for item in passes
}


def program() -> Iterator[ast.AST]:
    """All nodes of the program's code."""
    for folder in ("lorafx", "passes", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield from ast.walk(ast.parse(path.read_text()))


def words_of(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", re.sub(r"([A-Z])", r"_\1", name).lower())


def misnamed(classes: dict[str, set[str]], glossary: dict[str, set[str]]) -> set[str]:
    """Public classes, with their bases, that take a word of the glossary for another thing."""

    def known(name: str, listed: set[str]) -> bool:
        return name in listed or any(known(base, listed) for base in classes.get(name, ()))

    def takes(name: str, word: str) -> bool:
        parts = word.split()
        ends = words_of(name)[-len(parts) :]
        return ends in (parts, [*parts[:-1], f"{parts[-1]}s"])

    public = {name for name in classes if not name.startswith("_")}
    return {
        f"{name}: {word}"
        for name in public - PASSES
        for word, listed in glossary.items()
        if takes(name, word) and not known(name, listed)
    }


CLASSES = {
    node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
    for node in program()
    if isinstance(node, ast.ClassDef)
}


def test_public_classes_use_the_words_of_the_glossary_in_their_meaning() -> None:
    assert len(GLOSSARY) > 25
    assert {name for classes in GLOSSARY.values() for name in classes} <= CLASSES.keys()
    assert not misnamed(CLASSES, GLOSSARY)


def test_a_class_that_takes_a_word_for_another_thing_is_found() -> None:
    glossary = {"owner": {"Owners"}, "row map": {"RowMap"}}
    classes = {"Owner": set(), "Owners": set(), "ModuleOwner": {"Owners"}, "OwnerTable": set()}
    classes |= {"TypeMap": set(), "RowMaps": set(), "_Owner": set()}
    assert misnamed(classes, glossary) == {"Owner: owner", "RowMaps: row map"}


def unwanted(words: Iterable[str]) -> set[str]:
    return {word for word in words if word in NOT_USED or word.removesuffix("s") in NOT_USED}


def test_words_that_the_glossary_replaces_are_not_used() -> None:
    assert "road" in NOT_USED
    assert not NOT_USED & GLOSSARY.keys()
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    names = (node.name for node in program() if isinstance(node, named))
    assert not {name for name in names if unwanted(words_of(name))}
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        prose = page.read_text().replace(WORDS, "")
        prose = re.sub(r"```.*?```|`[^`]*`", " ", prose, flags=re.S)
        assert not unwanted(re.findall(r"[a-z]+", prose.lower())), page
