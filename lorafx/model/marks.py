"""The mark: a forward hook that adds one site's delta to its module's output.

    linear:     y ← y + scales[s, i] · (x A[s, :r, i·K : (i + 1)·K]ᵀ) B[s, :r, o : o + N]
    conv:       y ← y + scales[s, 0] · B[s, :r]ᵀ conv(x, A[s, :r])
    embedding:  y ← y + e · scales[s, 0] · A[s, ids, :r] B[s, :r]

x (…, K) or ids (…), y (…, N), s the slot of the batch, i the sibling, o its offset in the bank, e
the factor of embeddings that scale their output. The module's own forward runs unchanged. Where its
input and output do not have these shapes, a registered handler says what x and y are.

A mark is a plain picklable object, so deep copies and pickles of a marked model stay marked. Dynamo
inlines `__call__`: banks and slots become graph inputs, and nothing depends on their values.

One file: what Dynamo inlines into a graph stands in one class; half of the rest is its messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorafx.kernels.ops.conv_ops
import lorafx.kernels.ops.linear_ops
import lorafx.kernels.ops.row_ops  # noqa: F401  (all define torch.ops.lorafx)
from lorafx.errors import MatchError, ProvenanceError
from lorafx.kernels.ops.conv_ops import Window
from lorafx.kernels.ops.own_rows import own_product
from lorafx.model.bank import Bank
from lorafx.model.made_weights import maker_of
from lorafx.model.runtime import Runtime
from lorafx.model.weight_formats import is_dense
from lorafx.registry import Handler, Kind
from lorafx.torch_internals.dynamo import assume_constant_result, derives
from lorafx.torch_internals.transforms import tracing, transformed


@assume_constant_result
def refuse_at_rest(runtime: Runtime, path: str) -> bool:
    """Raise MatchError for a trace outside of calls that would lose the default adapter's delta."""
    try:
        if runtime.resting is not None:
            runtime.resting.refuse(path, path or "the model")
    except MatchError as error:
        raise MatchError(f"{error}. {_WAY_OUT}") from None
    return True


@assume_constant_result
def is_unchanged(module: nn.Module, *sizes: int) -> bool:
    """Whether nn.Linear's forward runs with a weight of these sizes, and no hook changes its output
    before marks see it. (A graph that was given a mark here could not be saved.)"""
    weight = module._parameters.get("weight")
    marks = [isinstance(hook, SiteMark) for hook in module._forward_hooks.values()]
    known = getattr(module.forward, "__func__", None) is nn.Linear.forward
    known = known and marks == sorted(marks, reverse=True)
    return known and weight is not None and weight.shape == sizes


_WAY_OUT = (
    "To export a model with an adapter, call lorafx.export, or export what "
    "export_merged(name, folder) of lorafx.compile writes"
)


_TRANSFORMED = (
    "Python calls it inside of a transform of torch.func, as grad or vmap, or in forward mode of "
    "torch.autograd, where nothing adds a delta; use lorafx.compile, and let Dynamo trace the "
    "whole transform, without a graph break"
)

UNPROVED = 0  # the op's `rows` before `provenance`: the rows' requests are not known yet


class Owners(NamedTuple):
    """Row m belongs to the request with slots[(m // rows) % n], slots int32 (n,)."""

    slots: Tensor
    rows: int


@dataclass(eq=False)
class SiteMark:
    """Hook of one site, for `register_forward_hook(mark, with_kwargs=True)`.

    Attributes:
        first: a call of the model may reach this mark before all others.
        siblings, offsets, sizes: for each part of the site, its number in the bank, its first
            column of B, and its number of columns.
        of_linear: x is the argument and y the output of nn.Linear's forward, and the delta is the
            low-rank product alone.
        window: how the kernels of a convolution's A move over x; None for other kinds.
        weight_name, transposed: where the module keeps W, and whether as (K, N).
        derived: the module's forward is not that of the registered class, so the first eager call
            compares its output with the product.
        handler: says what x and y are where input and output do not have the site's sizes; trusted.
        stored: the weight is in a format, so that only the whole call is known to compute x Wᵀ.
        made: a parametrisation or a hook computes the weight.
        weight, bias: packed base weight and bias of the group, set by the pack step.
    """

    path: str
    runtime: Runtime
    bank: Bank
    siblings: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    kind: Kind
    in_features: int
    out_features: int
    weight_name: str = "weight"
    transposed: bool = False
    derived: bool = False
    handler: Handler | None = None
    stored: bool = False
    made: bool = False
    weight: Tensor | None = None
    bias: Tensor | None = None
    checked: bool = False
    window: Window | None = None
    first: bool = False
    of_linear: bool = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The output with the delta, or None (output unchanged) when no adapter is active.

        Raises:
            MatchError: other sizes than the site's or another computation (in a trace `match` looks
                for the weight's use instead), a handler that adds no delta, or a layer that runs by
                itself while an adapter is the default.
            ProvenanceError: an eager forward of a batch that mixes adapters.
            BatchError: an eager forward on another thread than that of the running call.
        """
        # Dynamo traces each instruction, in a tenth of a millisecond, and each function that is
        # called, in one. So the products of most sites have a short way.
        runtime, bank, traced = self.runtime, self.bank, tracing()
        shape = self.out_features, self.in_features
        if traced and self.of_linear and args and runtime.active and is_unchanged(module, *shape):
            if runtime.graph_passes and derives():
                return None  # as below
            factors = bank.A, bank.B, bank.ranks, bank.scales, runtime.slots
            ranges = self.siblings, self.offsets, self.sizes
            packed = self.weight, self.bias
            return torch.ops.lorafx.site(args[0], output, *factors, *ranges, UNPROVED, *packed)
        if not traced and runtime.deltas is not None and runtime.deltas.has_added(self, output):
            return None
        resting = None if traced else runtime.resting
        if self.first and resting is not None:
            resting.refuse_slips()
        if not runtime.active:
            if resting is not None:
                resting.refuse(self.path, self._name(module))
            elif traced and runtime.active is None:
                refuse_at_rest(runtime, self.path)
            return None
        if resting is not None:
            resting.refuse_elsewhere()
        # The mark's operators have no derivatives, and match does not see the bodies of operators:
        # it adds the delta to each product with the weight, or refuses the site.
        if traced and runtime.graph_passes and not (self.stored or self.handler) and derives():
            return None
        if not traced and transformed():
            raise MatchError(f"{self._name(module)}: {_TRANSFORMED}")
        if self.kind == "experts":
            return self._mark_experts(module, output)
        if self.handler is not None:
            return self._call_handler(self.handler, module, args, kwargs, output)
        tensors = (value for value in kwargs.values() if isinstance(value, Tensor))
        x: Any = args[0] if args else next(tensors, None)
        is_tuple = not traced and isinstance(output, tuple)
        y = output[0] if is_tuple and output else output
        scaled = self.kind == "embedding" and self.derived
        scale = self._output_scale(module) if scaled else None
        if not self._accepts(x, y, None):
            # Without a weight in the graph, match would have nothing to add the delta to.
            has_weight = isinstance(getattr(module, self.weight_name, None), Tensor)
            if traced and runtime.graph_passes and has_weight:
                return None
            raise MatchError(self._misfit_message(module, x, output))
        if not traced:
            self._check_product(module, x, output, scale)
        # DoRA does not rescale the bias.
        bias = None if self.bank.gains is None else getattr(module, "bias", None)
        ranges = self.siblings, self.offsets, self.sizes
        bias = bias if isinstance(bias, Tensor) else None
        with_delta = self.with_delta if traced else self._eager_adder()
        weight = None
        if self.bank.own is not None and not (traced and (self.made or self.stored)):
            stored = self.stored  # only its forward multiplies by it
            weight = module.forward if stored else getattr(module, self.weight_name, None)
        y = with_delta(x, y, scale, ranges, bias, weight)
        if is_tuple:  # named tuples keep their names
            return getattr(output, "_make", tuple)((y, *output[1:]))
        return y

    def _eager_adder(self) -> Callable[..., Tensor]:
        """`with_delta` for a forward in eager mode."""
        deltas = self.runtime.deltas
        if deltas is not None:
            return partial(deltas.add, self)
        self._refuse_mixed()
        return self.with_delta

    def with_delta(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor | float | None,
        ranges: Sequence[Sequence[int]],
        addend: Tensor | None = None,
        base: Tensor | Callable[[Tensor], Any] | None = None,
        owners: Owners | None = None,
    ) -> Tensor:
        """y with the delta of the bank's columns `ranges`; DoRA does not rescale `addend`. `base`
        is the weight, or what multiplies by it. `owners` are those of the rows; without them all
        rows have one."""
        bank = self.bank
        slots, rows = (self.runtime.slots, UNPROVED) if owners is None else owners
        # DoRA is refused for sites with a handler.
        gains = bank.gains if self.handler is None else None
        # A plain tuple: a NamedTuple made while Dynamo traces would have the graph depend on an
        # object of this process, and such graphs cannot be saved.
        own_rows: tuple[Tensor | None, ...] = (bank.own, bank.own_at, bank.own_table)
        own_rows += (bank.own_bias, bank.pair_a, bank.pair_b)
        if self.stored and tracing():
            y = torch.ops.lorafx.rows_of(x, y)
        if base is not None and not isinstance(base, Tensor):
            y = own_product(x, y, bank.own_rows, slots, rows, base)
            own_rows, base = (None,) * len(own_rows), None
        if self.kind == "embedding":
            scales = bank.scales if scale is None else bank.scales * scale
            if scale is not None and bank.own is not None:
                own_rows = (bank.own * scale, *own_rows[1:])
            return torch.ops.lorafx.embedding_site(
                x, y, bank.A, bank.B, bank.ranks, scales, slots, rows, gains, *own_rows
            )
        factors = bank.A, bank.B, bank.ranks, bank.scales, slots
        addend = None if gains is None else addend
        if self.window is not None:
            tail = (*self.window, gains, addend, bank.shifts)
            return torch.ops.lorafx.conv_site(x, y, *factors, rows, *tail)
        all_columns = sum(ranges[2]) == self.out_features
        packed = (self.weight, self.bias) if all_columns else (None, None)
        if base is not None:
            packed = (base.mT if self.transposed else base, None)
        shifts = None if self.handler is not None else bank.shifts
        return torch.ops.lorafx.site(
            x, y, *factors, *ranges, rows, *packed, gains, addend, *own_rows, shifts
        )

    @property
    def is_plain(self) -> bool:
        """Whether the delta is the low-rank product alone, of a linear."""
        bank = self.bank
        extra = (bank.gains, bank.shifts, bank.own)
        return self.kind == "linear" and not any(item is not None for item in extra)

    def _call_handler(
        self,
        handler: Handler,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        calls = 0

        def add(x: Tensor, y: Tensor, start: int = 0) -> Tensor:
            nonlocal calls
            calls += 1
            if not self._accepts(x, y, start):
                raise MatchError(self._misplaced_message(module, x, y, start))
            with_delta = self.with_delta if tracing() else self._eager_adder()
            return with_delta(x, y, None, self._columns(start, y.shape[-1]))

        result = handler(module, args, kwargs, output, add)
        if not calls or result is None:
            raise MatchError(self._lost_message(module, calls))
        return result

    def _accepts(self, x: Any, y: Any, start: int | None) -> bool:
        """Whether the delta of x fits y (…, n): its columns [start, start + n), all for None."""
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or y.dim() == 0:
            return False
        if self.kind == "embedding":
            all_columns = not start and y.shape[-1] == self.out_features
            is_ids = not x.is_floating_point() and x.dtype is not torch.bool
            return all_columns and is_ids and x.shape == y.shape[:-1]
        if self.window is not None:
            dims = len(self.window.kernel) + 2
            channels = self.in_features // math.prod(self.window.kernel)
            fits = x.dim() == y.dim() == dims and x.shape[:2] == (y.shape[0], channels)
            return fits and y.shape[1] == self.out_features
        columns = y.shape[-1]
        # Compared with ==: for !=, Dynamo would specialise the graph on these sizes.
        fits = x.dim() > 0 and x.shape[-1] == self.in_features and x.shape[:-1] == y.shape[:-1]
        if start is None:
            return fits and columns == self.out_features
        return fits and 0 <= start <= self.out_features - columns

    def _columns(self, start: int, count: int) -> tuple[list[int], list[int], list[int]]:
        siblings, offsets, sizes = list[int](), list[int](), list[int]()
        first = 0
        for sibling, offset, size in zip(self.siblings, self.offsets, self.sizes, strict=True):
            low, high = max(first, start), min(first + size, start + count)
            if low < high:
                siblings.append(sibling)
                offsets.append(offset + low - first)
                sizes.append(high - low)
            first += size
        return siblings, offsets, sizes

    def _mark_experts(self, module: nn.Module, output: Any) -> Tensor | None:
        """In a trace, record that the experts ran, for `match`. In eager mode, refuse adapters."""
        traced = tracing() and self.runtime.graph_passes
        if traced and isinstance(output, Tensor):
            return torch.ops.lorafx.expert_mark(output, self.bank.A)
        if not traced and self.runtime.deltas is not None:
            self.runtime.deltas.experts(self)
            return None
        slots = [slot for slot in self.runtime.slots.tolist() if slot >= 0]
        if bool(self.bank.ranks.unflatten(0, (self.bank.experts, -1))[:, slots].any()):
            raise MatchError(
                f"{self._name(module)}: LoRA on routed experts belongs inside their "
                "forward, where eager mode cannot add it; use lorafx.compile or "
                "torch.compile"
            )
        return None

    def _output_scale(self, module: nn.Module) -> Tensor | float | None:
        """The factor that a derived embedding's forward multiplies W[ids] by, or None."""
        scale = getattr(module, "embed_scale", None)
        if isinstance(scale, Tensor):
            return scale if self.stored else scale.to(getattr(module, self.weight_name).dtype)
        return scale

    def _check_product(
        self, module: nn.Module, x: Tensor, output: Any, scale: Tensor | float | None
    ) -> None:
        once = self.checked and self.kind != "embedding"  # eager mode follows products of linears
        if once or not (self.derived or isinstance(output, tuple)):
            return
        if isinstance(output, tuple) or not self._found_product(module, x, output, scale):
            raise MatchError(
                f"{self._name(module)}: its class overrides forward, which does not compute "
                f"{'W[ids]' if self.kind == 'embedding' else 'x Wᵀ + b'} of its input, so "
                "adding the delta to its output would not be W + ΔW; use lorafx.compile, "
                "which finds the weight's use in the graph, lorafx.register(handler=...), "
                "or exclude_modules"
            )
        self.checked = True

    @torch.no_grad()
    def takes_argument(self, module: nn.Module) -> bool:
        """Whether the module multiplies its argument itself, and returns that: by an eager call so
        far, or by a small one that is made here."""
        weight = getattr(module, self.weight_name)
        if self.checked:
            return True
        x = torch.linspace(-1, 1, self.in_features, dtype=weight.dtype, device=weight.device)
        if self.kind == "embedding":
            x = torch.arange(min(self.in_features, 8), device=weight.device)
        try:
            y, scale = module.forward(x[None]), self._output_scale(module)
        except Exception:  # code of others, which may want another call
            return False
        return self._accepts(x[None], y, None) and self._is_product(module, x[None], y, scale)

    def _found_product(self, *arguments: Any) -> bool:
        """`_is_product`, whose own product is none of the forward's."""
        deltas, look = self.runtime.deltas, partial(self._is_product, *arguments)
        return look() if deltas is None else deltas.outside(look)

    @torch.no_grad()
    def _is_product(
        self, module: nn.Module, x: Tensor, y: Tensor, scale: Tensor | float | None
    ) -> bool:
        """Whether y is x Wᵀ + b or `scale` · W[ids], up to rounding; quantised weights pass."""
        if maker_of(module, self.weight_name):
            return False  # as in graphs, where the product is not found
        weight = getattr(module, self.weight_name, None)
        if self.stored or not isinstance(weight, Tensor) or not is_dense(weight):
            return True
        if weight.is_meta or not y.numel():
            return True
        if self.kind == "embedding":
            if not 0 <= int(x.min()) <= int(x.max()) < len(weight):
                return False  # no ids of this table
            expected = F.embedding(x.long(), weight)
            expected = expected if scale is None else expected * scale
        else:
            w = weight.T if self.transposed else weight
            expected = F.linear(x.to(weight.dtype), w, getattr(module, "bias", None))
        tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
        bound = tolerance * max(1e-6, float(expected.abs().max()))
        return torch.allclose(y.float(), expected.float(), rtol=tolerance, atol=bound)

    def _refuse_mixed(self) -> None:
        if not self.runtime.uniform:
            raise ProvenanceError(
                f"{self.path or 'the model'}: the batch mixes adapters, and eager mode does "
                "not know which request a row belongs to; use lorafx.compile, or one "
                "adapter per batch"
            )

    def _misfit_message(self, module: nn.Module, x: Any, output: Any) -> str:
        return (
            f"{self._name(module)}: a call with input {_describe(x)} and output "
            f"{_describe(output)}, but the site maps {self._input_pattern()} to (…, "
            f"{self.out_features}), so the delta does not fit this call; use "
            "lorafx.compile, which finds the weight's use in the graph, "
            "lorafx.register(handler=...), or exclude_modules"
        )

    # Not traced: Dynamo cannot resume in the middle of an f-string.
    @torch.compiler.disable
    def _misplaced_message(self, module: nn.Module, x: Any, y: Any, start: int) -> str:
        return (
            f"{self._name(module)}: its handler calls add({_describe(x)}, {_describe(y)}, {start}),"
            f" but the delta maps {self._input_pattern()} to columns of (…, {self.out_features})"
        )

    @torch.compiler.disable
    def _lost_message(self, module: nn.Module, calls: int) -> str:
        fault = "returned None instead of the output" if calls else "did not call add(x, y)"
        return (
            f"{self._name(module)}: its handler {fault}, so the delta would be lost; see "
            "lorafx.register(handler=...)"
        )

    def _input_pattern(self) -> str:
        if self.window is not None:
            channels = self.in_features // math.prod(self.window.kernel)
            return f"(rows, {channels}, {'…, ' * len(self.window.kernel)})"
        return "ids (…)" if self.kind == "embedding" else f"(…, {self.in_features})"

    def _name(self, module: nn.Module) -> str:
        return f"{self.path or 'the model'} ({type(module).__qualname__})"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__qualname__


@dataclass(eq=False)
class RowHook:
    """Hook of a quantised module without LoRA, whose kernels no ownership rule covers. In traces
    with adapters, y ← rows_of(x, y) says that row m of y = x Wᵀ has the owner of row m of x."""

    runtime: Runtime
    out_features: int
    embedding: bool

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not self.runtime.active or not tracing() or not args:
            return None
        x = args[0]
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or output.dim() == 0:
            return None
        rows = x.shape if self.embedding else x.shape[:-1]
        if output.shape[:-1] != rows or output.shape[-1] != self.out_features:
            return None
        return torch.ops.lorafx.rows_of(x, output)


#: Classes of lorafx's hooks.
MARKS = (SiteMark, RowHook)
