"""Copies of a shared node for each request, by torch's batching rules.

One file: the methods call one another; a node's operands are copied first, each by any of them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from lorafx.op_arguments import bound, in_order, index_of, operand
from lorafx.ownership import contractions, pointwise
from lorafx.ownership.flow import Flow, called_by, operator_name, outputs, place, wrap
from lorafx.ownership.labels import Label, Mixed, Own
from lorafx.ownership.propagate import rule_for
from lorafx.ownership.site_rules import COPIES_DIM, input_name
from lorafx.ownership.symbolic import ONE, Shape, divide, equal
from lorafx.program.context import CONV_OP
from lorafx.program.emitter import Emitter
from lorafx.program.frame import fake_value
from lorafx.torch_internals.graph_parts import enable_python_dispatcher, make_fx

aten, prims = torch.ops.aten, torch.ops.prims


#: Of a node with several results there are several.
Copies: TypeAlias = Any
#: A shared 0-d tensor does not promote dtypes; its copies (n,) may.
OTHER_TYPE = "the copies have another dtype than the original"


class NoCopy(Exception):
    """A node's result cannot be copied for each request."""

    def __init__(self, node: fx.Node, why: str) -> None:
        name = "the graph's result" if node.op == "output" else operator_name(node)
        super().__init__(f"{name}: {why}" + ("" if node.op == "output" else f" ({place(node)})"))


class Vectorizer:
    """Maps shared nodes to their copies (n, …), which it inserts before the node `before`."""

    before: fx.Node

    def __init__(self, flow: Flow, emitter: Emitter) -> None:
        self.flow, self.emitter = flow, emitter
        self.copies: dict[fx.Node, Copies] = {}

    def vectorized(self, node: fx.Node) -> Copies:
        """The copies of `node` from its operands' copies, by torch's batching rules. Raises NoCopy
        if there is none."""
        if node.target is operator.getitem:
            return self.copies[operand(node)][index_of(node)]
        try:
            new = self._copied(node)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise NoCopy(node, _of_copies(error)) from error
        after = [fake_value(copy) for copy in (new if isinstance(new, (tuple, list)) else [new])]
        for value, copies in zip(outputs(node), after, strict=True):
            if not isinstance(value, torch.Tensor) or not isinstance(copies, torch.Tensor):
                raise NoCopy(node, "its results are not tensors")
            if value.dtype != copies.dtype:
                raise NoCopy(node, OTHER_TYPE)
            expected = (self.flow.batch, *self.flow.sizes.shape(value))
            shape = self.flow.sizes.shape(copies)
            if len(shape) != len(expected) or not all(map(equal, shape, expected)):
                raise NoCopy(node, f"copies of sizes {expected} came out as {shape}")
        return new

    def _copied(self, node: fx.Node) -> Copies:
        packet = called_by(node)
        if packet in BATCHED:
            return self._batched(node, BATCHED[packet] or node.target)
        if packet in (aten.cat, aten.stack):
            call = bound(node)
            copies = [self.copies_of(tensor) for tensor in call["tensors"]]
            return self.emit(node.target, copies, wrap(call["dim"], len(self.flow.shape(node))) + 1)
        if packet in OF_IMAGES:
            return self._of_images(node)
        if packet is prims.rev:
            dims = [dim + 1 for dim in bound(node)["dims"]]
            return self.emit(node.target, self.copies[operand(node)], dims)
        if rule_for(node.target)[0] is not pointwise.pointwise:
            raise NoCopy(node, "no rule copies what this operator computes")
        ndim = len(self.flow.shape(node))

        def copies_of(arg: fx.Node) -> fx.Node:
            return self.unsqueezed(arg, ndim) if arg in self.copies else arg

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), copies_of)
        if kwargs.get("memory_format") not in (torch.contiguous_format, torch.preserve_format):
            kwargs = {name: value for name, value in kwargs.items() if name != "memory_format"}
        return self.emit(node.target, *args, **kwargs)

    def _batched(self, node: fx.Node, target: Any) -> Copies:
        """The operators that torch.vmap makes of a node, in the graph."""
        operands = list(node.all_input_nodes)
        others = [arg for arg in operands if arg in self.copies and arg is not operand(node)]
        if others and called_by(node) not in contractions.PRODUCTS:
            raise NoCopy(node, "an operand that should be the same for all requests is not")
        return self._vmapped(node, target, self.copies)

    def _of_images(self, node: fx.Node) -> fx.Node:
        """An operator on images (k, C, …): its copies (n, k, C, …) are n·k images."""
        image = operand(node)
        if any(arg is not image and arg in self.copies for arg in node.all_input_nodes):
            raise NoCopy(node, "a kernel of each request")
        images = self._as_images(self.copies[image])
        args, kwargs = fx.node.map_arg(
            (node.args, dict(node.kwargs)), lambda arg: images if arg is image else arg
        )
        return self.of_requests(self.emit(node.target, *args, **kwargs))

    def _as_images(self, copies: fx.Node) -> fx.Node:
        sizes = [self.size_of(copies, d) for d in range(2, fake_value(copies).dim())]
        return self.emit(aten.reshape.default, copies, [-1, *sizes])

    def of_requests(self, images: fx.Node) -> fx.Node:
        """Copies (n, k, C, …) of n·k images."""
        sizes = [self.size_of(images, d) for d in range(1, fake_value(images).dim())]
        return self.emit(aten.reshape.default, images, [self.count, -1, *sizes])

    def _vmapped(self, node: fx.Node, target: Any, by_request: Mapping[fx.Node, Copies]) -> Copies:
        """target(...) for each request, from (n, …) of the operands in `by_request`."""
        operands = list(node.all_input_nodes)
        copies = [by_request.get(arg, arg) for arg in operands]

        def single(*values: Any) -> Any:
            value_of = dict(zip(operands, values, strict=True)).__getitem__
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
            return target(*args, **kwargs)

        in_dims = tuple(0 if arg in by_request else None for arg in operands)
        with enable_python_dispatcher(), self.emitter.fake_mode or nullcontext():
            traced = make_fx(torch.vmap(single, in_dims))(*map(fake_value, copies)).graph
        if any(inner.op == "get_attr" for inner in traced.nodes):
            raise NoCopy(node, "its copies need a constant")
        inputs = (inner for inner in traced.nodes if inner.op == "placeholder")
        with self.emitter.graph.inserting_before(self.before):
            return self.emitter.graph.graph_copy(traced, dict(zip(inputs, copies, strict=True)))

    def site(self, node: fx.Node) -> fx.Node:
        """The site with copies of x and y, and thus each request's delta."""
        op: Any = node.target
        call, name = bound(node), input_name(node)
        x, y = call[name], call["y"]
        if any(arg in self.copies for arg in node.all_input_nodes if arg not in (x, y)):
            raise NoCopy(node, "its factors depend on requests")
        images = op is CONV_OP
        rows = self.flow.shape(y)[: 1 if images else -1]
        if self.flow.shape(x)[: len(rows)] != rows:
            raise NoCopy(node, "x and y have rows of other sizes")

        try:
            copies = {name: self.copies_of(x), "y": self.copies_of(y)}
            if images:
                copies = {k: self._as_images(v) for k, v in copies.items()}
            new = self.emit(op, *in_order(op, call, **copies))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise NoCopy(node, _of_copies(error)) from error
        new.meta[COPIES_DIM] = 0
        return new

    def emit(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        return self.emitter.call(self.before, target, *args, **kwargs)

    @property
    def count(self) -> Any:
        count = self.emitter.size(self.flow.batch, self.before)
        if count is None:
            raise ValueError("the graph cannot compute the number of requests")
        return count

    def size_of(self, node: fx.Node, dim: int) -> Any:
        return self.emitter.size_of(node, dim, self.before)

    def copies_of(self, node: fx.Node) -> fx.Node:
        """Copies (n, …) of any node; one without copies is expanded."""
        if node in self.copies:
            return self.copies[node]
        sizes = [self.count] + [-1] * len(self.flow.shape(node))
        return self.emit(aten.expand.default, self.emit(aten.unsqueeze.default, node, 0), sizes)

    def unsqueezed(self, node: fx.Node, ndim: int) -> fx.Node:
        """Copies of a node with `ndim` dimensions besides the first, (n, 1, …, 1, …)."""
        copies = self.copies[node]
        for _ in range(ndim - len(self.flow.shape(node))):
            copies = self.emit(aten.unsqueeze.default, copies, 1)
        return copies

    # --- copies meet owned values ---

    def repeated_by_size(self, node: fx.Node) -> fx.Node | None:
        """A node that repeats a shared operand for each request, with copy i as repetition i."""
        if not self.flow.batch.is_Symbol:
            return None  # an unrelated size may have the same value
        packet = called_by(node)
        if packet is aten.expand:
            return self._expanded_by_size(node)
        if packet is aten.repeat:
            return self._tiled_by_size(node)
        is_pointwise = rule_for(node.target)[0] is pointwise.pointwise
        return self._broadcast_by_size(node) if is_pointwise else None

    def _broadcast_by_size(self, node: fx.Node) -> fx.Node | None:
        """A pointwise node with another operand that has an entry for each request (a mask)."""
        flow, new = self.flow, self.flow.shape(node)
        dims = [d for d, size in enumerate(new) if size == flow.batch]
        operands = {arg for arg in node.all_input_nodes if arg in self.copies}
        if len(dims) != 1 or any(self._size_at(arg, dims[0], len(new)) != ONE for arg in operands):
            return None
        moved = {arg: self._copies_along(arg, len(new), dims[0]) for arg in operands}
        args, kwargs = fx.node.map_arg(
            (node.args, dict(node.kwargs)), lambda arg: moved.get(arg, arg)
        )
        return self.emit(node.target, *args, **kwargs)

    def _size_at(self, arg: fx.Node, dim: int, ndim: int) -> sympy.Expr:
        shape = self.flow.shape(arg)
        index = dim - ndim + len(shape)
        return shape[index] if index >= 0 else ONE

    def _expanded_by_size(self, node: fx.Node) -> fx.Node | None:
        flow, first = self.flow, operand(node)
        new = flow.shape(node)
        dims = [d for d, size in enumerate(new) if size == flow.batch]
        dims = [d for d in dims if self._size_at(first, d, len(new)) == ONE]
        if len(dims) != 1:
            return None
        copies = self._copies_along(first, len(new), dims[0])
        sizes = list(bound(node)["size"])
        sizes[dims[0]] = -1
        return self.emit(aten.expand.default, copies, sizes)

    def _tiled_by_size(self, node: fx.Node) -> fx.Node | None:
        """Tiling along dimension d: index i of n·size belongs to repetition i // size."""
        flow, first, repeats = self.flow, operand(node), list(bound(node)["repeats"])
        dims = [d for d, times in enumerate(repeats) if flow.size(times) == flow.batch]
        if len(dims) != 1:
            return None
        d, n = dims[0], len(repeats)
        copies = self.unsqueezed(first, n)
        repeats[d] = 1
        if any(flow.size(times) != ONE for times in repeats):
            copies = self.emit(aten.repeat.default, copies, [1, *repeats])
        return self._side_by_side(copies, d)

    def _side_by_side(self, copies: fx.Node, dim: int) -> fx.Node:
        """Copies (n, …) as parts of dimension `dim`, one behind the other."""
        ndim = fake_value(copies).dim()
        order = [*range(1, dim + 1), 0, *range(dim + 1, ndim)]
        moved = self.emit(aten.permute.default, copies, order)
        sizes = [self.size_of(moved, d) for d in range(ndim) if d not in (dim, dim + 1)]
        return self.emit(aten.reshape.default, moved, [*sizes[:dim], -1, *sizes[dim:]])

    def product_by_request(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """(result, replacement) of a product or attention, some of whose operands are copies and
        others owned: op(copies[b], b's part of what is owned), for each request b."""
        label, single = self.flow.labels[node], self.flow.labels[node]
        result: fx.Node = node
        if isinstance(label, tuple):
            single, users = label[0], list(node.users)
            if len(users) != 1 or users[0].target is not operator.getitem or index_of(users[0]):
                return None
            result = users[0]
        rule = rule_for(node.target)[0]
        if rule not in _PRODUCT_RULES or not isinstance(single, Own) or single.perm is not None:
            return None
        masks = [bound(node).get(name) for name in ("attn_mask", "attn_bias")]
        if all(arg in masks for arg in node.all_input_nodes if arg in self.copies):
            return None
        owned = {arg: self.flow.label(arg) for arg in node.all_input_nodes}
        parts = {
            arg: self._part_of_copies(node, arg, single)
            if arg in self.copies
            else self._by_request(node, arg, of)
            for arg, of in owned.items()
            if arg in self.copies or of is not None
        }
        try:
            new = self._vmapped(node, node.target, parts)
            new = new if result is node else new[0]
            shape, dim = self.flow.shape(result), single.dim
            if not equal(shape[dim], single.rows * self.flow.batch):
                raise NoCopy(node, f"{shape[dim]} is not proved to be one period of {single}")
            expected = (self.flow.batch, *shape[:dim], single.rows, *shape[dim + 1 :])
            if not all(map(equal, self.flow.sizes.shape(fake_value(new)), expected)):
                raise NoCopy(node, f"its parts came out as {fake_value(new).shape}")
            return result, self._side_by_side(new, dim)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise NoCopy(node, _of_copies(error)) from error

    def _part_of_copies(self, node: fx.Node, arg: fx.Node, label: Own) -> fx.Node:
        """Each request's copy of an operand, or that of its own rows, if the operand has the rows
        of all requests along the dimension by which products are batched."""
        rule, shape = rule_for(node.target)[0], self.flow.shape(arg)
        batched = rule is contractions.attention or called_by(node) in (aten.bmm, aten.baddbmm)
        rows = self.emitter.size(label.rows, self.before)
        if label.dim or not batched or len(shape) < 3 or rows is None:
            return self.copies[arg]
        if not equal(shape[0], label.rows * self.flow.batch):
            return self.copies[arg]
        copies = self._rows_by_owner(arg, len(shape), 0, [1, self.count, rows])
        return self.emit(aten.squeeze.dim, copies, 0)

    def _by_request(self, node: fx.Node, arg: fx.Node, label: Label) -> fx.Node:
        """The parts (n, …, rows, …) of an owned operand."""
        shape = self.flow.shape(arg)
        if not isinstance(label, Own) or label.perm is not None:
            raise NoCopy(node, f"an operand cannot be taken apart into its requests: {label}")
        dim, rows = label.dim, self.emitter.size(label.rows, self.before)
        if rows is None or not equal(shape[dim], label.rows * self.flow.batch):
            raise NoCopy(node, f"{shape[dim]} is not proved to be one period of {label}")
        sizes = [self.size_of(arg, d) for d in range(len(shape))]
        sizes[dim : dim + 1] = [self.count, rows]
        parts = self.emit(aten.reshape.default, arg, sizes)
        order = [dim, *range(dim), *range(dim + 1, len(shape) + 1)]
        return self.emit(aten.permute.default, parts, order)

    def operands_by_owner(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """(operand, replacement) pairs for copies that are broadcast along an owner dimension.
        Raises NoCopy for others."""
        flow, label = self.flow, self.flow.labels[node]
        single = label[0] if isinstance(label, tuple) else label
        if isinstance(single, Mixed):
            raise NoCopy(node, f"it meets a tensor without proved ownership: {single.reason}")
        operands = [arg for arg in node.all_input_nodes if arg in self.copies]
        rule = rule_for(node.target)[0]
        shape = flow.shape(node)
        if rule is contractions.attention:
            args = bound(node)
            masks = [args.get(name) for name in ("attn_mask", "attn_bias")]
            query, key = flow.shape(args["query"]), flow.shape(args["key"])
            shape = (*query[:3], key[2])
            if any(arg not in masks for arg in operands):
                raise NoCopy(node, "it attends to something that all requests share")
        elif called_by(node) is aten.cat:
            if not isinstance(single, Own) or single.dim == wrap(bound(node)["dim"], len(shape)):
                raise NoCopy(node, "no rule gives each request its copy here")
        elif rule is not pointwise.pointwise or isinstance(label, tuple):
            raise NoCopy(node, "no rule gives each request its copy here")
        if not isinstance(single, Own) or single.perm is not None:
            raise NoCopy(node, f"no rule gives each request its copy along {single}")
        return [(arg, self._copy_by_owner(node, arg, shape, single)) for arg in operands]

    def _copy_by_owner(self, node: fx.Node, arg: fx.Node, shape: Shape, label: Own) -> fx.Node:
        flow, dim = self.flow, label.dim
        size = self._size_at(arg, dim, len(shape))
        if size != ONE and not equal(size, shape[dim]):
            raise NoCopy(node, f"sizes {flow.shape(arg)} are not broadcast along dimension {dim}")
        periods = divide(shape[dim], label.rows * flow.batch)
        if periods is None:
            raise NoCopy(node, f"{shape[dim]} is not proved to hold whole periods of {label}")
        # (…, periods, n, rows, …) in row-major order is the owner's dimension.
        times, rows = (self.emitter.size(size, self.before) for size in (periods, label.rows))
        if times is None or rows is None:
            raise NoCopy(node, f"the graph cannot compute the sizes of {label}")
        if size != ONE:
            copies = self._rows_by_owner(arg, len(shape), dim, [times, self.count, rows])
        else:
            copies = self._copies_along(arg, len(shape), dim)
            if label.rows == ONE and periods == ONE:
                return copies
            copies = self.emit(aten.unsqueeze.default, copies, dim)
            copies = self.emit(aten.unsqueeze.default, copies, dim + 2)
            sizes: list[Any] = [-1] * (len(shape) + 2)
            sizes[dim], sizes[dim + 2] = times, rows
            copies = self.emit(aten.expand.default, copies, sizes)
        dims = (*range(dim), *range(dim + 3, len(shape) + 2))
        others: list[Any] = [self.size_of(copies, d) for d in dims]
        return self.emit(aten.reshape.default, copies, [*others[:dim], -1, *others[dim:]])

    def _rows_by_owner(self, arg: fx.Node, ndim: int, dim: int, parts: list[Any]) -> fx.Node:
        """Rows of `arg` along `dim` as (…, periods, n, rows, …), each of its owner's copy; `parts`
        are these three sizes."""
        copies = self.unsqueezed(arg, ndim)
        sizes: list[Any] = [self.size_of(copies, d) for d in range(ndim + 1)]
        sizes[dim + 1 : dim + 2] = parts
        copies = self.emit(aten.reshape.default, copies, sizes)
        copies = self.emit(aten.diagonal.default, copies, 0, 0, dim + 2)  # (…, n)
        order = [*range(dim + 1), ndim + 1, *range(dim + 1, ndim + 1)]
        return self.emit(aten.permute.default, copies, order)

    def _copies_along(self, node: fx.Node, ndim: int, dim: int) -> fx.Node:
        """Copies of `node` in `ndim` dimensions, along `dim`, where `node` has size one."""
        copies = self.emit(aten.squeeze.dim, self.unsqueezed(node, ndim), dim + 1)
        if dim == 0:
            return copies
        order = [*range(1, dim + 1), 0, *range(dim + 1, ndim)]
        moved = self.emit(aten.permute.default, copies, order)
        return self.emit(aten.clone.default, moved, memory_format=torch.contiguous_format)


def _of_copies(error: Exception) -> str:
    return f"it cannot run on copies: {' '.join(str(error).split())[:200]}"


#: Operators that torch.vmap copies for a symbolic number of requests, by operators that Inductor
#: lowers -> what it is given instead: copies may have another layout than the original.
BATCHED: Mapping[object, Any] = {
    **dict.fromkeys(
        (aten.view, aten._unsafe_view, aten.reshape, aten._reshape_copy, aten.view_copy),
        aten.reshape.default,
    ),
    **dict.fromkeys(
        (
            aten.permute, aten.t, aten.squeeze, aten.expand, aten.repeat, aten.index,
            aten._unsafe_index, aten.mm, aten.addmm, aten.transpose, aten.unsqueeze, aten.select,
            aten.slice, aten.split, aten.split_with_sizes, aten.unbind, aten.index_select,
            aten.flip, aten.roll, aten.constant_pad_nd, aten.cumsum, aten.cumprod, aten._softmax,
            aten._log_softmax, aten._safe_softmax, aten.native_layer_norm, aten.sum, aten.mean,
            aten.amax, aten.amin, aten.var, aten.std, aten.var_mean, aten.std_mean, aten.logsumexp,
            aten.bmm, aten.baddbmm,
        )
    ),
}  # fmt: skip
#: Operators whose first operand has images along its first dimension, which they keep.
OF_IMAGES = (
    aten.convolution, aten.avg_pool2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d,
    aten.upsample_nearest2d,
)  # fmt: skip
#: Products of copies with owned operands are computed for each request.
_PRODUCT_RULES = frozenset(contractions.RULES.values()) - {contractions.grouped}
VIEWS = (aten.view.default, aten._unsafe_view.default)
#: Operators whose results depend on the operand's layout.
OF_LAYOUT = (
    *(aten.as_strided, aten.as_strided_copy, aten.as_strided_scatter),
    *(aten.sym_stride, aten.sym_storage_offset),
)
