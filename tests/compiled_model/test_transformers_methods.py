"""Which methods of transformers' base classes run the model: each is served or refused by name.

Found in their sources: what calls `self` or something taken from it, hands `self` on, or calls such
a method. A method that transformers adds fails the test until somebody says what becomes of it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

import pytest
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from lorafx.compiled_model.compiled import CompiledModel
from lorafx.compiled_model.names import GENERATING, REFUSED

pytestmark = pytest.mark.quick

#: Found, and yet they run no layer: those that prepare the model or its arguments.
HARMLESS = {"init_weights", "initialize_weights", "post_init", "prepare_inputs_for_generation"}


def _functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for cls in dict.fromkeys((*GenerationMixin.__mro__, *PreTrainedModel.__mro__)):
        if cls in nn.Module.__mro__:
            continue
        lines = inspect.getsource(cls)
        [tree] = ast.parse(textwrap.dedent(lines)).body
        assert isinstance(tree, ast.ClassDef)
        yield from ((f.name, f) for f in tree.body if isinstance(f, ast.FunctionDef))


def _mentions(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))


def _of_self(function: ast.FunctionDef) -> set[str]:
    """`self`, and the variables that hold a part of it that could be called."""
    names = {"self"}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and _is_part(node.value, names):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        if isinstance(node, ast.NamedExpr) and _is_part(node.value, names):
            names.add(node.target.id)
    return names


def _is_part(value: ast.AST, names: set[str]) -> bool:
    """`self`, `self.x`, `getattr(self, ...)` and `self.get_x()`, also with one of them chosen."""
    if isinstance(value, ast.IfExp):
        return _is_part(value.body, names) or _is_part(value.orelse, names)
    if isinstance(value, ast.Call):
        got = isinstance(value.func, ast.Attribute) and value.func.attr.startswith("get_")
        attribute = isinstance(value.func, ast.Name) and value.func.id == "getattr"
        return (got and _is_part(value.func, names)) or (
            attribute and _mentions(value.args[0], names)
        )
    while isinstance(value, ast.Attribute):
        value = value.value
    return isinstance(value, ast.Name) and value.id in names


def _calls(function: ast.FunctionDef) -> Iterator[str]:
    """The methods of `self` that are called; "()" where `self`, or a part of it, is itself."""
    names = _of_self(function)
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Attribute):
            if isinstance(called.value, ast.Name) and called.value.id == "self":
                yield "()" if called.attr in ("forward", "__call__") else called.attr
            continue
        if isinstance(called, ast.Call) and _is_part(called, names):
            yield "()"  # self.get_encoder()(...)
        if isinstance(called, ast.Name) and called.id in names:
            yield "()"
        looks = isinstance(called, ast.Name) and called.id[:1].islower()
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        if not looks and any(isinstance(a, ast.Name) and a.id == "self" for a in given):
            yield "()"  # an object that keeps the model


def running() -> set[str]:
    """Names of the methods that run the model, themselves or by others."""
    calls: dict[str, set[str]] = {}
    for name, function in _functions():
        calls.setdefault(name, set()).update(_calls(function))
    found = {name for name, called in calls.items() if "()" in called}
    while more := {name for name, called in calls.items() if called & found} - found:
        found |= more
    return found


def test_every_method_that_runs_the_model_is_served_or_refused():
    public = {name for name in running() if not name.startswith("_")}
    assert {"generate", "generate_batch", "init_continuous_batching"} <= public
    served = {name for name in public if hasattr(CompiledModel, name)}
    assert public - served - {*REFUSED, *GENERATING} == HARMLESS


def test_what_is_refused_is_there():
    for name in (*REFUSED, *GENERATING):
        assert hasattr(PreTrainedModel, name) or hasattr(GenerationMixin, name), name
