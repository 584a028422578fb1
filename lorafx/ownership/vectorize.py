"""Operators vectorised over requests: once more, on one copy per request of what all share.

    t (…) depends on no request    →    copies of t (n, …), where copies[i] is request i's

Every rule keeps op(copies)[i] = op(copies[i]): the operator runs on tensors with one dimension more
in front, and what it says about dimensions is said one further on. Operators that no rule knows end
it, as do operands in places where a rule expects something shared.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from lorafx.op_arguments import bound, in_order, index_of, operand
from lorafx.ownership import pointwise
from lorafx.ownership.emit import Emitter
from lorafx.ownership.flow import Flow, operator_name, outputs, place, wrap
from lorafx.ownership.indexing import is_boolean
from lorafx.ownership.propagate import called_by, rule_for
from lorafx.ownership.site_rules import GIVEN_DIM, input_name
from lorafx.ownership.symbolic import ONE, equal

aten, prims = torch.ops.aten, torch.ops.prims
BatchingRule = Callable[[fx.Node, "Vectorizer"], fx.Node]
#: One number for all requests does not widen what it meets, a number for each request may.
OTHER_TYPE = "the copies have another dtype than the original"


class Ended(Exception):
    """The vectorised part of the graph ends before a node."""

    def __init__(self, node: fx.Node, why: str) -> None:
        name = "the graph's result" if node.op == "output" else operator_name(node)
        super().__init__(f"{name}: {why}" + ("" if node.op == "output" else f" ({place(node)})"))


class Vectorizer:
    """Copies of shared nodes, added to their graph in its order.

    Attributes:
        copies: a shared node -> the node with its copies (n, …).
        before: new nodes are put before this one.
    """

    def __init__(self, graph: fx.Graph, flow: Flow, emitter: Emitter) -> None:
        self.graph, self.flow, self.emitter = graph, flow, emitter
        self.copies: dict[fx.Node, fx.Node] = {}
        self.before: fx.Node = next(iter(graph.nodes))

    def vectorized(self, node: fx.Node) -> fx.Node:
        """The copies of `node`, some of whose operands have copies.

        Raises:
            Ended: no rule knows how.
        """
        rule = _rule(node)
        if rule is None:
            raise Ended(node, "no rule copies what this operator computes")
        new = self._tried(node, rule)
        for before, after in zip(outputs(node), outputs(new), strict=True):
            if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
                raise Ended(node, "its results are not tensors")
            if before.dtype != after.dtype:
                raise Ended(node, OTHER_TYPE)
            wanted = (self.flow.batch, *self.flow.sizes.shape(before))
            found = self.flow.sizes.shape(after)
            if len(found) != len(wanted) or not all(map(equal, found, wanted)):
                raise Ended(node, f"copies of sizes {wanted} came out as {found}")
        return new

    def site(self, node: fx.Node) -> fx.Node:
        """site(x, y, ...) and embedding_site(ids, y, ...) of one copy per request: the product y is
        the same for all of them and computed once, the deltas differ."""
        op: Any = node.target
        call, name = bound(node), input_name(node)
        x, y = call[name], call["y"]
        if any(arg in self.copies for arg in node.all_input_nodes if arg not in (x, y)):
            raise Ended(node, "its factors depend on requests")
        rows = self.flow.shape(y)[:-1]
        if self.flow.shape(x)[: len(rows)] != rows:
            raise Ended(node, "x and y have rows of other sizes")

        def copied(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
            copies = {name: self.copies_of(x), "y": self.copies_of(y)}
            return self.emit(op, *in_order(op, call, **copies))

        new = self._tried(node, copied)
        new.meta[GIVEN_DIM] = 0
        return new

    def _tried(self, node: fx.Node, rule: BatchingRule) -> fx.Node:
        try:
            return rule(node, self)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            text = " ".join(str(error).split())[:200]
            raise Ended(node, f"it cannot run on copies: {text}") from error

    # --- what rules use ---

    def emit(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        return self.emitter.call(self.before, target, *args, **kwargs)

    @property
    def count(self) -> Any:
        """n, as a number or a node."""
        count = self.emitter.size(self.flow.batch, self.before)
        if count is None:
            raise ValueError("the graph cannot compute the number of requests")
        return count

    def size_of(self, node: fx.Node, dim: int) -> Any:
        """One size of a new node, as a number or a node."""
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.emit(aten.sym_size.int, node, dim)

    def copies_of(self, node: fx.Node) -> fx.Node:
        """(n, …): its copies, or the same for every request."""
        if node in self.copies:
            return self.copies[node]
        sizes = [self.count] + [-1] * len(self.flow.shape(node))
        return self.emit(aten.expand.default, self.emit(aten.unsqueeze.default, node, 0), sizes)

    def wide(self, node: fx.Node, ndim: int) -> fx.Node:
        """Copies of what is broadcast to `ndim` dimensions, (n, 1, …, 1, …)."""
        copies = self.copies[node]
        for _ in range(ndim - len(self.flow.shape(node))):
            copies = self.emit(aten.unsqueeze.default, copies, 1)
        return copies

    def only(self, node: fx.Node, *allowed: object) -> None:
        """Of the operands only these have copies."""
        for arg in node.all_input_nodes:
            if arg in self.copies and not any(arg is one for one in allowed):
                raise Ended(node, "an operand that should be the same for all requests is not")


def _rebuilt(node: fx.Node, vectorizer: Vectorizer, args: dict[str, Any]) -> fx.Node:
    """The operator with these arguments, by their names."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = [args[one.name] for one in schema.arguments if not one.kwarg_only]
    named = {one.name: args[one.name] for one in schema.arguments if one.kwarg_only}
    return vectorizer.emit(node.target, *given, **named)


# --- rules ---


def _pointwise(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    ndim = len(vectorizer.flow.shape(node))

    def wide(arg: fx.Node) -> fx.Node:
        return vectorizer.wide(arg, ndim) if arg in vectorizer.copies else arg

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), wide)
    if kwargs.get("memory_format") not in (torch.contiguous_format, torch.preserve_format):
        kwargs = {name: value for name, value in kwargs.items() if name != "memory_format"}
    return vectorizer.emit(node.target, *args, **kwargs)


_DIMS = ("dim", "dims", "dim0", "dim1")


def _along(
    node: fx.Node, vectorizer: Vectorizer, *, all_if_none: bool = False, more: int = 0
) -> fx.Node:
    """An operator of one tensor that says which dimensions it works along."""
    args = bound(node)
    first = operand(node)
    vectorizer.only(node, first)
    assert isinstance(first, fx.Node)
    n = len(vectorizer.flow.shape(first))
    for name in _DIMS:
        if name not in args:
            continue
        value = args[name]
        if value is None or (isinstance(value, Sequence) and not value):
            if not all_if_none:
                raise Ended(node, "it works along no dimension, or along all of them flattened")
            args[name] = list(range(1, n + 1))
        elif isinstance(value, int):
            args[name] = wrap(value, n + more) + 1
        else:
            args[name] = [wrap(dim, n + more) + 1 for dim in value]
    args[next(iter(args))] = vectorizer.copies[first]
    return _rebuilt(node, vectorizer, args)


def _reduced(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    if "dim" not in bound(node):
        raise Ended(node, "it reduces all dimensions")
    return _along(node, vectorizer, all_if_none=True)


def _unsqueezed(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    return _along(node, vectorizer, more=1)


def _squeezed(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    first = operand(node)
    assert isinstance(first, fx.Node)
    if "dim" in bound(node):
        return _along(node, vectorizer)
    dims = [d + 1 for d, size in enumerate(vectorizer.flow.shape(first)) if size == ONE]
    return vectorizer.emit(aten.squeeze.dims, vectorizer.copies[first], dims)


def _permuted(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    first, dims = operand(node), bound(node)["dims"]
    dims = [0, *(wrap(dim, len(dims)) + 1 for dim in dims)]
    return vectorizer.emit(aten.permute.default, vectorizer.copies[first], dims)


def _turned(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    first = operand(node)
    assert isinstance(first, fx.Node)
    copies = vectorizer.copies[first]
    if len(vectorizer.flow.shape(first)) < 2:
        return vectorizer.emit(aten.alias.default, copies)
    return vectorizer.emit(aten.transpose.int, copies, 1, 2)


def _viewed(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    args = bound(node)
    size = args.get("size", args.get("shape"))
    if not isinstance(size, (list, tuple)):
        raise Ended(node, "a view of the bits as another type")
    copies = vectorizer.copies[operand(node)]
    return vectorizer.emit(aten.reshape.default, copies, [vectorizer.count, *size])


def _expanded(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    size = bound(node)["size"]
    wide = vectorizer.wide(operand(node), len(size))
    return vectorizer.emit(aten.expand.default, wide, [vectorizer.count, *size])


def _repeated(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    repeats = bound(node)["repeats"]
    wide = vectorizer.wide(operand(node), len(repeats))
    return vectorizer.emit(aten.repeat.default, wide, [1, *repeats])


def _joined(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    """cat and stack of tensors some of which have copies."""
    args = bound(node)
    tensors, n = args["tensors"], len(vectorizer.flow.shape(node))
    if any(
        len(vectorizer.flow.shape(t)) != len(vectorizer.flow.shape(tensors[0])) for t in tensors
    ):
        raise Ended(node, "it joins tensors of unequal numbers of dimensions")
    copies = [vectorizer.copies_of(t) for t in tensors]
    return vectorizer.emit(node.target, copies, wrap(args["dim"], n) + 1)


def _indexed(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    """x[indices] with the same indices for all requests."""
    x, indices = operand(node), list(bound(node)["indices"])
    vectorizer.only(node, x)
    at = [d for d, index in enumerate(indices) if index is not None]
    if any(is_boolean(indices[d]) for d in at) or at != list(range(at[0], at[0] + len(at))):
        raise Ended(node, "indexed by a mask, or at dimensions that are not neighbours")
    return vectorizer.emit(node.target, vectorizer.copies[x], [None, *indices])


def _written(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    """select_scatter, slice_scatter: src laid over a part of x."""
    args = bound(node)
    x, src = args.pop("self"), args.pop("src")
    args["dim"] = wrap(args["dim"], len(vectorizer.flow.shape(x))) + 1
    copies = vectorizer.copies_of(x), vectorizer.copies_of(src)
    return vectorizer.emit(node.target, *copies, *args.values())


def _gathered(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    args = bound(node)
    x, index = args["self"], args["index"]
    vectorizer.only(node, x)
    dim = wrap(args["dim"], len(vectorizer.flow.shape(x))) + 1
    return vectorizer.emit(node.target, vectorizer.copies[x], dim, vectorizer.copies_of(index))


def _as_it_is(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    """It counts dimensions from the last one."""
    first, args = operand(node), bound(node)
    vectorizer.only(node, first)
    args[next(iter(args))] = vectorizer.copies[first]
    return vectorizer.emit(node.target, *in_order(node.target, args))  # type: ignore[arg-type]


def _product(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    """mm (n, m, k) by (k, p) or (n, k, p), addmm with a bias of one dimension."""
    args = bound(node)
    a, b = args.get("self"), args.get("mat2")
    bias = None
    if "mat1" in args:
        bias, a, b = a, args["mat1"], b
        plain = args.get("beta", 1) == 1 and args.get("alpha", 1) == 1
        if bias in vectorizer.copies or len(vectorizer.flow.shape(bias)) != 1 or not plain:
            raise Ended(node, "the addend of the product is not a bias")
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    if b in vectorizer.copies:
        found = vectorizer.emit(aten.bmm.default, vectorizer.copies_of(a), vectorizer.copies[b])
        return found if bias is None else vectorizer.emit(aten.add.Tensor, found, bias)
    copies = vectorizer.copies[a]
    sizes = [vectorizer.size_of(copies, dim) for dim in range(3)]
    flat = vectorizer.emit(aten.reshape.default, copies, [-1, sizes[2]])
    found = vectorizer.emit(node.target, *((flat, b) if bias is None else (bias, flat, b)))
    return vectorizer.emit(aten.reshape.default, found, [sizes[0], sizes[1], -1])


def _batched_product(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    args = bound(node)
    pairs = [vectorizer.copies_of(args[name]) for name in ("self", "mat2")]
    sizes = [[vectorizer.size_of(pair, dim) for dim in range(4)] for pair in pairs]
    flat = [
        vectorizer.emit(aten.reshape.default, pair, [-1, *size[2:]])
        for pair, size in zip(pairs, sizes, strict=True)
    ]
    found = vectorizer.emit(aten.bmm.default, *flat)
    return vectorizer.emit(aten.reshape.default, found, [*sizes[0][:3], sizes[1][3]])


def _item(node: fx.Node, vectorizer: Vectorizer) -> fx.Node:
    return vectorizer.emit(operator.getitem, vectorizer.copies[operand(node)], index_of(node))


RULES: dict[object, BatchingRule] = {
    **dict.fromkeys(
        (aten.view, aten._unsafe_view, aten.reshape, aten._reshape_copy, aten.view_copy), _viewed
    ),
    aten.permute: _permuted,
    aten.t: _turned,
    aten.unsqueeze: _unsqueezed,
    aten.squeeze: _squeezed,
    aten.expand: _expanded,
    aten.repeat: _repeated,
    **dict.fromkeys((aten.cat, aten.stack), _joined),
    **dict.fromkeys((aten.index, aten._unsafe_index), _indexed),
    **dict.fromkeys((aten.select_scatter, aten.slice_scatter), _written),
    aten.gather: _gathered,
    **dict.fromkeys((aten.constant_pad_nd, aten.native_layer_norm), _as_it_is),
    **dict.fromkeys((aten.mm, aten.addmm), _product),
    aten.bmm: _batched_product,
    **dict.fromkeys(
        (
            aten.transpose, aten.select, aten.slice, aten.split, aten.split_with_sizes,
            aten.unbind, aten.index_select, aten.flip, prims.rev, aten.roll, aten.cumsum,
            aten.cumprod, aten._softmax, aten._log_softmax, aten._safe_softmax,
        ),
        _along,
    ),
    **dict.fromkeys(
        (
            aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.std, aten.var_mean,
            aten.std_mean, aten.logsumexp,
        ),
        _reduced,
    ),
}  # fmt: skip


def _rule(node: fx.Node) -> BatchingRule | None:
    if node.target is operator.getitem:
        return _item
    packet = called_by(node)
    if packet in RULES:
        return RULES[packet]
    return _pointwise if rule_for(node.target)[0] is pointwise.pointwise else None
