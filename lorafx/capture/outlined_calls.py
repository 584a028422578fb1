"""Inductor interprets an outlined body once, and not for each call of it.

    h1 = body(h0; W0, bank0)    interpreted: what comes out is laid out so and so
    h2 = body(h1; W1, bank1)    operands are laid out as those were: so is what comes out

Inductor propagates fake tensors through a graph several times, and torch's own cache of their
results knows symbolic sizes by the objects that stand for them, which differ from layer to layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from lorafx.captured_frame import size_expression
from lorafx.kernels.ops.stamp_op import Layout
from lorafx.model.module_graph import storage_key
from lorafx.passes.outline.outline import INVOKE


class _Known(NamedTuple):
    """What a call gave. `body` is held, since keys have its identity."""

    body: Any
    kind: type
    results: tuple[Layout, ...]


@contextmanager
def interpreted_once(inputs: Sequence[Any]) -> Iterator[None]:
    """Inside, the fake mode of `inputs` interprets a body once for all calls whose operands are
    laid out alike, in sizes that are known to be equal."""
    mode = detect_fake_mode(list(inputs))
    rules = INVOKE.python_key_table
    interpret = rules.get(FakeTensorMode)
    if mode is None or interpret is None:
        yield
        return
    known: dict[Hashable, _Known] = {}

    def call(own: FakeTensorMode, body: Any, name: str | None, *operands: Any) -> Any:
        key = _key(body, operands) if own is mode else None
        if key is None:
            return interpret(own, body, name, *operands)
        if key not in known:
            results = interpret(own, body, name, *operands)
            if _are_new(results, operands):
                layouts = tuple(map(Layout.of, results))
                known[_key(body, operands)] = _Known(body, type(results), layouts)
            return results
        found = known[key]
        return found.kind(layout.empty(mode) for layout in found.results)

    rules[FakeTensorMode] = call
    try:
        yield
    finally:
        rules[FakeTensorMode] = interpret


def _key(body: Any, operands: Sequence[Any]) -> Hashable:
    """Equal for calls whose results are laid out alike; None where that is not known.

    Where memory begins is left out, as it is where layers are found to be alike
    (lorafx.passes.outline.isomorphism). Passes of Inductor's rewrite bodies in place, and write
    beside their results how these are laid out then.
    """
    if not isinstance(body, fx.GraphModule):
        return None
    described = [id(body)]
    output: Any = body.graph.output_node().args[0]
    made = [item.meta.get("val") if isinstance(item, fx.Node) else item for item in output]
    for value in (*operands, *made):
        part = _described(value)
        if part is None:
            return None
        described.append(part)
    return tuple(described)


def _described(value: Any) -> Any:
    if isinstance(value, FakeTensor) and value.layout is torch.strided:
        return (
            tuple(map(size_expression, value.shape)),
            tuple(map(size_expression, value.stride())),
            value.dtype,
            value.device,
            value.requires_grad,
            value.is_conj(),
            value.is_neg(),
            type(value),
        )
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return size_expression(value)
    return None


def _are_new(results: Any, operands: Sequence[Any]) -> bool:
    """Whether a call gave plain tensors, each in memory of its own, and no size that is found out
    when it runs."""
    if not isinstance(results, (tuple, list)):
        return False
    for value in results:
        plain = isinstance(value, FakeTensor) and value.layout is torch.strided
        if not plain or value.requires_grad or value.is_conj() or value.is_neg():
            return False
        offset = value.storage_offset()
        if not isinstance(offset, int) or offset or free_unbacked_symbols(value):
            return False
    memory = [storage_key(item) for item in (*results, *operands) if isinstance(item, Tensor)]
    own = memory[: len(results)]
    return len({*own}) == len(own) and {*own}.isdisjoint(memory[len(results) :])
