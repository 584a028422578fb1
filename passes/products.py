"""Products with a dense weight become an op that multiplies few rows by generated code, on a CPU.

    mm(x, Wᵀ)                                  →   dense_mm(x, W, [])
    addmm(b, x, Wᵀ)                            →   dense_addmm(b, x, W, [])
    cat([mm(x, W[:n]ᵀ), mm(x, W[n:]ᵀ)], 1)     →   dense_mm(x, W, [n, N - n])

W is an input of the graph or a part of one; products that always have many rows are unchanged. If
a delta is the only reader of such a product, `join` puts both into one parallel region
(lorafx.kernels.cpu.dense):

    run_delta_(y = dense_mm(x, W), x, bank)         →   dense_mm_delta(x, W, bank)
    run_delta_(y = dense_addmm(b, x, W), x, bank)   →   dense_addmm_delta(b, x, W, bank)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from lorafx.kernels.cpu.dense import (
    DENSE_ADDMM,
    DENSE_ADDMM_DELTA,
    DENSE_MM,
    DENSE_MM_DELTA,
    beats_aten,
    ready,
)
from lorafx.op_arguments import AUTO_FUNCTIONALIZED, bound, in_order, index_of, op_of
from lorafx.program.context import Context
from lorafx.program.frame import fake_value

aten = torch.ops.aten
_JOINED = {DENSE_MM: DENSE_MM_DELTA, DENSE_ADDMM: DENSE_ADDMM_DELTA}
RUN_DELTA = torch.ops.lorafx.run_delta_.default


@dataclass(frozen=True)
class Products:
    """Products with weights become an op with generated code for few rows, on a CPU."""

    name: str = "products"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if ctx.program.options.lowering != "inductor":
            return 0
        edits = 0
        for find in (_product_in_parts, _product):  # the parts are products themselves
            edits += sum(
                _replace(gm.graph, node, find, ctx.take_edit) for node in [*gm.graph.nodes]
            )
        return edits


class Product(NamedTuple):
    """x Wᵀ + bias. `sizes` has the numbers of rows of W's parts, if there are several."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    sizes: tuple[int, ...] = ()


def _replace(
    graph: fx.Graph,
    node: fx.Node,
    find: Callable[[fx.Node], Product | None],
    allowed: Callable[[], bool],
) -> bool:
    product = find(node) if node.users else None
    if product is None or not _pays(product) or not allowed():
        return False
    bias = () if product.bias is None else (product.bias,)
    op = DENSE_ADDMM if bias else DENSE_MM
    with graph.inserting_before(node):
        new = graph.call_function(op, (*bias, product.x, product.weight, list(product.sizes)))
    new.meta["val"] = fake_value(node)  # the same sizes, also contiguous
    node.replace_all_uses_with(new)
    graph.erase_node(node)  # its parts then have no readers
    return True


def _pays(product: Product) -> bool:
    """Whether there is a kernel for the dtype, and it may be faster than aten."""
    values = [fake_value(item) for item in product[:3] if item is not None]
    rows, dtype = values[0].shape[0], values[0].dtype
    if any(value.dtype != dtype or value.device.type != "cpu" for value in values):
        return False
    return ready(dtype) and (not isinstance(rows, int) or beats_aten(rows, dtype))


def _product(node: fx.Node) -> Product | None:
    if node.target is aten.mm.default:
        call = bound(node)
        x, right, bias = call["self"], call["mat2"], None
    elif node.target is aten.addmm.default:
        call = bound(node)
        x, right, bias = call["mat1"], call["mat2"], call["self"]
        if call["alpha"] != 1 or call["beta"] != 1 or fake_value(bias).dim() != 1:
            return None
        if fake_value(bias).shape[0] != fake_value(right).shape[1]:
            return None
    else:
        return None
    if right.target is not aten.permute.default or [*bound(right)["dims"]] != [1, 0]:
        return None
    weight = bound(right)["self"]
    return Product(x, weight, bias) if _is_part_of_input(weight) else None


def _is_part_of_input(weight: fx.Node) -> bool:
    if not all(isinstance(size, int) for size in fake_value(weight).shape):
        return False
    while weight.target is aten.slice.Tensor:
        weight = bound(weight)["self"]
    return weight.op == "placeholder"


def _product_in_parts(node: fx.Node) -> Product | None:
    """Products of one x with all rows of a weight, in order."""
    if node.target is not aten.cat.default or bound(node)["dim"] not in (1, -1):
        return None
    parts = [_product(item) for item in bound(node)["tensors"]]
    products = [part for part in parts if part and parts[0] and part.x is parts[0].x]
    if len(products) < max(len(parts), 2):
        return None
    weight = _sliced_tensor([part.weight for part in products])
    biases = [part.bias for part in products if part.bias is not None]
    bias = _sliced_tensor(biases) if len(biases) == len(products) else None
    if weight is None or (biases and bias is None):
        return None
    sizes = tuple(fake_value(part.weight).shape[0] for part in products)
    return Product(products[0].x, weight, bias, sizes)


def _sliced_tensor(parts: Sequence[fx.Node]) -> fx.Node | None:
    source, end = None, 0
    for part in parts:
        call = bound(part) if part.target is aten.slice.Tensor else {}
        if not call or call["dim"] != 0 or call["step"] != 1 or call["start"] != end:
            return None
        if source not in (None, call["self"]):
            return None
        source, end = call["self"], end + fake_value(part).shape[0]
    return source if source is not None and fake_value(source).shape[0] == end else None


@dataclass(frozen=True)
class Join:
    """Dense products and their deltas become one op, on a CPU."""

    name: str = "join"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        edits = 0
        for node in [*gm.graph.nodes]:
            if node.target is AUTO_FUNCTIONALIZED and _can_join(node) and ctx.take_edit():
                _join(gm.graph, ctx, node)
                edits += 1
        return edits


def _can_join(delta: fx.Node) -> bool:
    if op_of(delta) is not RUN_DELTA:
        return False
    call, readers = bound(delta), [*delta.users]
    product = call["y"]
    if product.target not in _JOINED or len(product.users) > 1:
        return False
    if any(reader.target is not operator.getitem or index_of(reader) != 1 for reader in readers):
        return False
    return bound(product)["x"] is call["x"] and ready(fake_value(product).dtype)


def _join(graph: fx.Graph, ctx: Context, delta: fx.Node) -> None:
    call = bound(delta)
    product = call["y"]
    op = _JOINED[product.target]
    with graph.inserting_before(delta):
        joined = graph.call_function(op, in_order(op, {**bound(product), **call}))
    joined.meta["val"] = fake_value(product)
    for written in [*delta.users]:
        written.replace_all_uses_with(joined)
        if written in ctx.states:
            ctx.states[joined] = ctx.states.pop(written)
        graph.erase_node(written)
    graph.erase_node(delta)
    graph.erase_node(product)
