"""No pass counts positions: what reads a call's arguments by number is listed here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
FOLDERS = ("passes", "lorafx/graph", "lorafx/ownership")
#: An output and `auto_functionalized_v2` have no schema.
KNOWN = {
    "passes/lower/triton_graph.py: _copied": "node.args[0]",
    "passes/write_in_place.py: _called": "node.args[0]",
}


def by_number(tree: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """(function, expression) of each item of a node's arguments, of each loop over them, and of
    each assignment that takes them apart. What sympy's expressions have is no call's."""
    for child in ast.iter_child_nodes(tree):
        names = {"args"}
        match child:
            case ast.Subscript(value=read):
                names = {"args", "all_input_nodes"}
            case ast.For(iter=read) | ast.comprehension(iter=read):
                pass
            case ast.Assign(targets=[ast.Tuple()], value=read):
                pass
            case _:
                read = None
        read_so = isinstance(read, ast.Attribute) and read.attr in names
        if read_so and ast.unparse(read.value) != "expr":
            yield function, ast.unparse(child)
        yield from by_number(child, child.name if isinstance(child, ast.FunctionDef) else function)


def test_arguments_are_read_by_name() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {function}": expression
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for function, expression in by_number(ast.parse(path.read_text()))
    }
    assert found == KNOWN, "read by schema: lorafx.op_arguments.bound, operand, index_of"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("x = node.args[0]", 1),
        ("call(*node.args[1:])", 1),
        ("x, y = user.args", 1),
        ("pairs = [f(arg) for arg in node.args]", 1),
        ("x = node.all_input_nodes[0]", 1),
        ("new = map_arg(node.args, f)", 0),
        ("labels = [label(arg) for arg in node.all_input_nodes]", 0),
        ("parts = [part for part in expr.args]", 0),
    ],
)
def test_what_is_found(source: str, count: int) -> None:
    assert len(list(by_number(ast.parse(source)))) == count
