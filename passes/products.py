"""Products with a weight become an op that multiplies few rows by generated code, on a CPU.

    mm(x, Wᵀ)                                  →   weight_mm(x, W)
    addmm(b, x, Wᵀ)                            →   weight_mm(x, W, b)
    cat([mm(x, W[:n]ᵀ), mm(x, W[n:]ᵀ)], 1)     →   weight_mm(x, W, None, [n, N - n])
    mm(x, ((q − z) ⊙ s)ᵀ), mm(x, qᵀ) ⊙ sᵀ      →   weight_mm(x, q, None, None, s, z)
    _weight_int4pack_mm_for_cpu(x, q, G, sz)   →   weight_mm(x, q, None, None, sz)
    the same + b                               →   weight_mm(x, q, b, None, s, z)

W is an input of the graph or a part of one, or made of integers q that are
(lorafx.program.stored_weights); products that always have many rows are unchanged. If a delta is
the only reader of such a product, `join` puts both into one parallel region
(lorafx.kernels.cpu.weight_mm):

    run_delta_(y = weight_mm(x, W, b), x, bank)   →   weight_mm_delta(x, W, bank, b)

Siblings whose weights are integers become one op over all of them, since nothing is copied into one
weight for `pack`:

    weight_mm_delta(x, q₀, bank, b₀, None, s₀), ...(x, q₁, bank, b₁, None, s₁)
        →   weight_mms_delta(x, [q₀, s₀, q₁, s₁], [b₀, b₁], bank)
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from lorafx.kernels.cpu.weight_mm import (
    MOST_WEIGHTS,
    WEIGHT_MM,
    WEIGHT_MM_DELTA,
    WEIGHT_MMS_DELTA,
    beats_aten,
    max_rows,
    ready,
)
from lorafx.kernels.cpu.weight_source import LONGEST_STEP, WeightSpec
from lorafx.kernels.ops.op_library import BankArgs
from lorafx.op_arguments import AUTO_FUNCTIONALIZED, bound, in_order, index_of, op_of, operand
from lorafx.program.context import Context
from lorafx.program.frame import fake_value
from lorafx.program.stored_weights import VIEWS, Affine, affine, table_of

aten = torch.ops.aten
RUN_DELTA = torch.ops.lorafx.run_delta_.default
_WEIGHT = ("weight", "scale", "zero")


@dataclass(frozen=True)
class Products:
    """Products with weights become an op with generated code for few rows, on a CPU."""

    name: str = "products"
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        if ctx.program.options.lowering != "inductor":
            return 0
        edits, fixed = 0, ctx.program.options.batch_invariant
        if fixed:
            for node in gm.graph.find_nodes(op="call_function", target=aten.bmm.default):
                edits += _flatten(ctx, node)
        # The parts are products themselves.
        for find in (_product_in_parts, _product, _packed_product, _affine_product):
            for node in [*gm.graph.nodes]:
                product = find(node) if node.users else None
                if product is not None and _pays(product._replace(fixed=fixed)):
                    _replace(gm.graph, product._replace(fixed=fixed))
                    edits += 1
        return edits


def _flatten(ctx: Context, node: fx.Node) -> bool:
    """bmm(x, W) by one weight (K, N) for all → mm(x, W), where the rows of a strided x were no
    view. Returns whether it is one."""
    call = bound(node)
    x, right = call["self"], call["mat2"]
    weight: Any = right
    while weight.target in (aten.expand.default, *VIEWS) and fake_value(weight).dim() > 2:
        weight = operand(weight)
    if tuple(fake_value(weight).shape) != tuple(fake_value(right).shape[1:]):
        return False
    K, N = fake_value(weight).shape
    with ctx.graph.inserting_before(node):
        rows = ctx.emit(aten.reshape.default, x, [-1, K])
        y = ctx.emit(aten.mm.default, rows, weight)
        sizes = [ctx.size(x, 0), ctx.size(x, 1), N]
        result = ctx.emit(aten.reshape.default, y, sizes)
    node.replace_all_uses_with(result)
    ctx.graph.erase_node(node)
    return True


class Product(NamedTuple):
    """A node with x Wᵀ + bias, in the arguments of lorafx::weight_mm."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None
    sizes: list[int] | None = None
    scale: fx.Node | None = None
    zero: fx.Node | None = None
    fixed: bool = False


def _pays(product: Product) -> bool:
    """Whether there is a kernel for the dtypes, and it may be faster than aten."""
    nodes = (product.x, product.weight, product.bias, product.scale, product.zero)
    x, *others = (fake_value(item) for item in nodes if item is not None)
    if any(item.device.type != "cpu" for item in (x, *others)) or x.dim() != 2:
        return False
    if product.bias is not None and fake_value(product.bias).dtype != x.dtype:
        return False
    spec, rows = _spec_of(product._asdict()), x.shape[0]
    if product.fixed or not isinstance(rows, int) or rows <= max_rows(spec):
        return ready(spec)
    return product.scale is None and ready(spec) and beats_aten(x.dtype)


def _spec_of(call: Mapping[str, Any]) -> WeightSpec | None:
    return WeightSpec.of(*fx.map_arg([call[name] for name in ("x", *_WEIGHT)], fake_value))


def _replace(graph: fx.Graph, product: Product) -> None:
    node, bias = product.node, product.bias
    viewed, added = node, None
    if product.scale is not None:
        _erase_copies(graph, node)
    if product.scale is not None and bias is None:
        viewed = _last_view(node)
        added = _only_reader(viewed, aten.add.Tensor)
        bias = None if added is None else _addend(added, viewed)
    arguments = in_order(WEIGHT_MM, product._asdict(), bias=bias)
    with graph.inserting_before(node):
        new = graph.call_function(WEIGHT_MM, arguments)
    new.meta["val"] = fake_value(node)  # the same sizes, also contiguous
    node.replace_all_uses_with(new)
    if added is not None and bias is not None:
        added.replace_all_uses_with(new if viewed is node else viewed)
    graph.erase_node(node)  # its parts then have no readers


def _erase_copies(graph: fx.Graph, node: fx.Node) -> None:
    while whole := [reader for reader in node.users if _keeps_all(reader)]:
        for reader in whole:
            reader.replace_all_uses_with(node)
            graph.erase_node(reader)


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
    return Product(node, x, weight, bias) if _is_part_of_input(weight) else None


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
    sizes = [fake_value(part.weight).shape[0] for part in products]
    return Product(node, products[0].x, weight, bias, sizes)


def _packed_product(node: fx.Node) -> Product | None:
    if node.target is not aten._weight_int4pack_mm_for_cpu.default:
        return None
    call = bound(node)
    x, group, factors = call["self"], call["qGroupSize"], call["qScaleAndZeros"]
    value = fake_value(factors)
    whole = value.shape[0] * group == fake_value(x).shape[1] and value.is_contiguous()
    fits = whole and group % LONGEST_STEP == 0
    return Product(node, x, call["mat2"], scale=factors) if fits else None


def _affine_product(node: fx.Node) -> Product | None:
    if node.target not in (aten.mm.default, aten.addmm.default):
        return None
    call = bound(node)
    x, right, bias = call["self"], call["mat2"], None
    if node.target is aten.addmm.default:
        x, bias = call["mat1"], _vector(x, fake_value(node).shape[1])
        if bias is None or call["alpha"] != 1 or call["beta"] != 1:
            return None
    weight = affine(right)
    if weight is None or not weight.transposed:
        return None
    product = node
    if weight.scale is None and bias is None:
        product = _only_reader(node, aten.mul.Tensor) or node
        weight = _scaled_later(weight, product)
    if weight is None or weight.scale is None:
        return None
    groups = fake_value(weight.scale).shape[1]
    if groups > 1 and weight.shape[1] // groups % LONGEST_STEP:
        return None
    return Product(product, x, weight.integers, bias, None, weight.scale, weight.zero)


def _only_reader(node: fx.Node, target: object) -> fx.Node | None:
    readers = [*node.users]
    return readers[0] if len(readers) == 1 and readers[0].target is target else None


def _keeps_all(node: fx.Node) -> bool:
    """Whether `node` is all that there is, as it is traced or as a slice."""
    if node.target is aten.alias.default:
        return True
    call = bound(node) if node.target is aten.slice.Tensor else {}
    whole = bool(call) and not call["start"] and call["end"] in (None, sys.maxsize)
    return whole and call["step"] == 1


def _last_view(node: fx.Node) -> fx.Node:
    """The last of the views of `node` that have one reader each."""
    while len(node.users) == 1 and next(iter(node.users)).target in VIEWS:
        node = next(iter(node.users))
    return node


def _scaled_later(weight: Affine, product: fx.Node) -> Affine | None:
    """W, if `product` is y ⊙ sᵀ for the product y of x and the integers."""
    if product.target is not aten.mul.Tensor or weight.zero is not None:
        return None
    (N, _), call = weight.shape, bound(product)
    for factor in (call["self"], call["other"]):
        same = isinstance(factor, fx.Node) and fake_value(factor).dtype == fake_value(product).dtype
        scale = table_of(factor, (N,), (N, 1)) if same else None
        if scale is not None:
            return replace(weight, scale=scale)
    return None


def _addend(added: fx.Node, product: fx.Node) -> fx.Node | None:
    call = bound(added)
    other = call["other"] if call["self"] is product else call["self"]
    vector = _vector(other, fake_value(product).shape[-1])
    if vector is None or call["alpha"] != 1:
        return None
    dtypes = {fake_value(node).dtype for node in (added, product, vector)}
    return vector if len(dtypes) == 1 else None


def _vector(node: Any, columns: int) -> fx.Node | None:
    """The input (columns,) that `node` is."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return None
    return node if tuple(fake_value(node).shape) == (columns,) else None


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
            if node.target is AUTO_FUNCTIONALIZED and _can_join(node):
                _join(gm.graph, ctx, node)
                edits += 1
        siblings = _siblings(gm.graph)
        for nodes in siblings:
            _gather(gm.graph, ctx, nodes)
        return edits + len(siblings)


def _can_join(delta: fx.Node) -> bool:
    if op_of(delta) is not RUN_DELTA:
        return False
    call, readers = bound(delta), [*delta.users]
    if any(reader.target is not operator.getitem or index_of(reader) != 1 for reader in readers):
        return False
    product = _product_of(delta)
    if product is None or not ready(_spec_of(bound(product))):
        return False
    x, wanted = bound(product)["x"], call["x"]
    while x is not wanted and x.target in VIEWS:
        x = operand(x)
    return x is wanted and fake_value(x).shape[-1] == fake_value(bound(product)["x"]).shape[-1]


def _product_of(delta: fx.Node) -> fx.Node | None:
    """The product whose view the delta is added to, if nothing else reads it."""
    y = bound(delta)["y"]
    columns = fake_value(y).shape[-1]
    while y.target in VIEWS and len(y.users) == 1:
        y = operand(y)
    known = y.target is WEIGHT_MM and len(y.users) == 1
    return y if known and fake_value(y).shape[-1] == columns else None


def _join(graph: fx.Graph, ctx: Context, delta: fx.Node) -> None:
    call, product = bound(delta), _product_of(delta)
    assert product is not None
    y = call["y"]
    with graph.inserting_before(delta):
        arguments = in_order(WEIGHT_MM_DELTA, {**call, **bound(product)})
        joined = result = graph.call_function(WEIGHT_MM_DELTA, arguments)
        joined.meta["val"] = fake_value(product)
        if y is not product:
            result = graph.call_function(y.target, (joined, *y.args[1:]))
            result.meta["val"] = fake_value(y)
    for written in [*delta.users]:
        written.replace_all_uses_with(result)
        if written in ctx.states:
            ctx.states[result] = ctx.states.pop(written)
        graph.erase_node(written)
    graph.erase_node(delta)


def _siblings(graph: fx.Graph) -> list[list[fx.Node]]:
    """Products of one x with integers, which are inputs, whose deltas have one bank."""
    groups: dict[tuple[object, ...], list[fx.Node]] = {}
    for node in graph.nodes:
        call = bound(node) if node.target is WEIGHT_MM_DELTA else {}
        if call.get("scale") is not None:
            x, columns = call["x"], int(fake_value(call["x"]).shape[1])
            while x.target in VIEWS:
                x = operand(x)
            shared = (call[name] for name in (*BankArgs._fields, "rows"))
            key = (x, columns, call["bias"] is None, call["zero"] is None, *shared)
            groups.setdefault(key, []).append(node)
    return [group for group in groups.values() if 1 < len(group) <= MOST_WEIGHTS]


def _gather(graph: fx.Graph, ctx: Context, nodes: Sequence[fx.Node]) -> None:
    calls = [bound(node) for node in nodes]
    lists = {
        "weights": [call[name] for call in calls for name in _WEIGHT if call[name] is not None],
        "biases": [call["bias"] for call in calls if call["bias"] is not None],
        "kernels": [call["kernel"] for call in calls],
    }
    with graph.inserting_before(nodes[0]):
        gathered = graph.call_function(
            WEIGHT_MMS_DELTA, in_order(WEIGHT_MMS_DELTA, calls[0], **lists)
        )
        parts = [graph.call_function(operator.getitem, (gathered, i)) for i in range(len(nodes))]
    gathered.meta["val"] = [fake_value(node) for node in nodes]
    for node, part in zip(nodes, parts, strict=True):
        part.meta["val"] = fake_value(node)
        node.replace_all_uses_with(part)
        if node in ctx.states:
            ctx.states[part] = ctx.states.pop(node)
        graph.erase_node(node)
