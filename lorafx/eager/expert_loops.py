"""Routed experts of an eager forward, by slices of 3-D weights or by products of sorted rows.

    y = x W[e]ᵀ   →   y' = y + s · (x A[e]ᵀ) B[e]        x (T, K), the rows that a router gave e
    y = lorafx::[stored_]grouped_mm(x, W, offs)          the same of all e, rows sorted by expert

While such a module runs, `ExpertLoop` is its forward. It sees which expert a slice is of, and the
products with it, as functions of torch, before a library's tensor subclass takes them apart: the
base's product is the library's own, in one step, as that of a linear is (`linear_calls`). Another
use of the weights is seen by the operators that it runs, and the mark refuses the call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached, is_parametrized

from lorafx.eager.deltas import RowDeltas, RowLayout
from lorafx.eager.in_python import Readers
from lorafx.eager.known_labels import NOBODYS, UNKNOWN, WEIGHTS
from lorafx.model.experts import by_lorafx, expert_weights
from lorafx.model.marks import Runtime, SiteMark
from lorafx.model.replaced_methods import ReplacedMethod, Replacement
from lorafx.model.stored_experts import held_parts
from lorafx.model.weight_formats import in_library_format
from lorafx.ownership.effects import tensors_in
from lorafx.ownership.memory import Geometry, geometry_of, storage_of
from lorafx.program.program import Program
from lorafx.torch_internals.dynamo import never_traced
from lorafx.torch_internals.graph_parts import (
    DeviceContext,
    DisableTorchFunction,
    TorchFunctionMode,
)
from lorafx.torch_internals.graph_parts import _get_current_function_mode_stack as function_modes

#: x W, by a matrix (in, out); F.linear's is (out, in).
_PRODUCTS: frozenset[Any] = frozenset(
    (Tensor.__matmul__, Tensor.matmul, Tensor.mm, torch.matmul, torch.mm)
)
#: What swaps the dimensions of a matrix.
_TURNS: frozenset[Any] = frozenset(
    (Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
)
#: Products of sorted rows with the weights of all experts.
_GROUPED: frozenset[Any] = frozenset(
    (torch.ops.lorafx.grouped_mm, torch.ops.lorafx.stored_grouped_mm)
)


class LoopDeltas(RowDeltas):
    """The deltas of one eager forward, with those of experts that run one after another."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        #: The paths of experts with products since their marks.
        self._multiplied: set[str] = set()

    def weight(self, module: nn.Module, name: str, mark: SiteMark | None) -> Tensor:
        """The weight of a module of experts, of a site if it has a mark; one that a parametrisation
        computes is known as the site's from now on."""
        if name in module._parameters:
            return module._parameters[name]  # type: ignore[return-value]

        def made() -> Tensor:
            weight = getattr(module, name)
            self._following.note_weight(weight, mark)
            return weight

        return self._following.outside(made)

    def product(
        self,
        weight: _Slice,
        used: Tensor,
        x: Tensor,
        others: Sequence[Any],
        call: Callable[[], Tensor],
    ) -> Tensor:
        """What `call` computes of x (…, K) and one expert's matrix, which is `used`, and of
        `others`, with the delta of this expert where its mark is a touched site's: y (…, N)."""
        following, mark = self._following, weight.mark
        path = "" if mark is None else mark.path

        def rows_of() -> tuple[int, RowLayout | None] | None:
            code, leads, rows = following.code(x), self._leads(x), None
            if any(following.code(item) != NOBODYS for item in tensors_in(others)):
                return None
            if following.code(used) not in (NOBODYS, WEIGHTS):
                return None
            if mark is not None and path in self._touched and x.numel():
                if place_of(used) != weight.place or not following.is_own(used, mark):
                    return None
                rows = self._leading(code, x) if leads or self._uniform else None
                if rows is None:
                    following.refuse(
                        f"{path}: which request each row of an expert's input belongs to is not "
                        "known"
                    )
                code = following.settled(code) if leads else UNKNOWN  # an adapter changes it
            elif not leads and code != NOBODYS:
                return None
            return code, rows

        found = following.outside(rows_of) if following.on_top else None
        if found is None:
            return call()  # by operators that are followed
        code, rows = found
        product = following.of_library(call)

        def with_delta() -> Tensor:
            y = product
            if mark is not None and rows is not None:
                y = self._with_expert(mark, weight.expert, x, y, rows)
            following.note(y, code)
            self._multiplied.add(path)
            return y

        return following.outside(with_delta)

    def _with_expert(
        self, mark: SiteMark, expert: int | Tensor, x: Tensor, y: Tensor, rows: RowLayout
    ) -> Tensor:
        """y with the deltas of rows that go through one expert: those of its slots of the bank; or
        through all, by the ends of their rows."""
        bank, capacity = mark.bank, len(mark.bank.ranks) // mark.bank.experts
        if isinstance(expert, Tensor):
            numbers = torch.arange(len(x), device=y.device)
            chosen = torch.searchsorted(expert, numbers, out_int32=True, right=True)
            slots = torch.tensor(rows.slots, dtype=torch.int32, device=y.device)
            given = bank.A, bank.B, bank.ranks, bank.scales, slots, chosen
            ranges = mark.siblings, mark.offsets, mark.sizes
            return torch.ops.lorafx.expert_site(x, y, *given, *ranges, rows.each, bank.experts)
        keys = tuple(expert * capacity + slot if slot >= 0 else -1 for slot in rows.slots)
        y = y.contiguous()
        if rows.few and self._sites is None and self._add_products(mark, x, y, keys):
            return y
        slots = torch.tensor(keys, dtype=torch.int32, device=y.device)
        factors = bank.A, bank.B, bank.ranks, bank.scales, slots
        return torch.ops.lorafx.site(
            x, y, *factors, mark.siblings, mark.offsets, mark.sizes, rows.each
        )

    def has_added(self, mark: SiteMark, y: Any) -> bool:
        """As of a linear, and of a module, such as a router, that returns more than its product."""
        if mark.kind == "experts" or mark.path not in self._multiplied:
            return super().has_added(mark, y)
        self.experts(mark)
        return True

    def experts(self, mark: SiteMark) -> None:
        """The module of a site has run, with its products. Refuses the call if another use of the
        weight was seen, or none."""
        others = self._following.marked_alone(mark)
        seen = mark.path in self._multiplied
        self._multiplied.discard(mark.path)
        if mark.path in self._touched and (others or not seen):
            self._following.refuse(
                f"{mark.path}: eager mode adds LoRA here to products F.linear(x, W) and x @ W, of "
                "routed experts to those with slices W[e], or by lorafx's implementation, and its "
                "module computes others"
            )


class _Weight(NamedTuple):
    """A matrix, or all experts' (E, N, K), or (E, K, N) if `in_first`; with its site's mark.
    `stored`: the tensor is the first of the parts that hold all experts'."""

    tensor: Tensor
    mark: SiteMark | None
    in_first: bool
    stored: bool = False


class _Slice(NamedTuple):
    """One expert's matrix, or that of a router, and where in its memory it was when it was made; or
    all experts' for rows that end at `expert` (E,)."""

    tensor: Tensor  # so that nothing else gets its id
    mark: SiteMark | None
    in_first: bool
    place: Geometry | None
    expert: int | Tensor = 0


def place_of(tensor: Tensor) -> Geometry | None:
    """The geometry of a tensor; None for one that consists of others."""
    with DisableTorchFunction():  # nothing reads its memory
        return None if storage_of(tensor) is None else geometry_of(tensor)


class _Products(TorchFunctionMode):
    """Adds the deltas to products with slices of weights."""

    def __init__(self, deltas: LoopDeltas, weights: Sequence[_Weight]) -> None:
        super().__init__()
        self._deltas = deltas
        whole = [item for item in weights if item.stored or item.tensor.dim() == 3]
        self._weights = {id(item.tensor): item for item in whole}
        self._slices = {
            id(item.tensor): _Slice(*item[:3], place_of(item.tensor))
            for item in weights
            if item.tensor.dim() == 2 and not item.stored and _is_plain(item.mark)
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named: dict[str, Any] = kwargs or {}
        call = partial(func, *args, **named)
        if func is Tensor.__getitem__ and id(args[0]) in self._weights:
            return self._sliced(self._weights[id(args[0])], args[1], call())
        if func in _GROUPED:
            x, held, ends, *_ = args
            first = held[0] if isinstance(held, list) else held
            whole = self._weights.get(id(first))
            if whole is not None and whole.in_first is (args[-1] if first is not held else True):
                by_ends = _Slice(first, whole.mark, whole.in_first, place_of(first), ends)
                return self._deltas.product(by_ends, first, x, (), call)
        if func in _TURNS and id(args[0]) in self._weights:
            turned, whole = call(), self._weights[id(args[0])]
            self._weights[id(turned)] = whole._replace(tensor=turned, in_first=not whole.in_first)
            return turned
        if func in _TURNS and (found := self._slices.get(id(args[0]))) is not None:
            turned = call()
            return self._kept(
                found._replace(tensor=turned, in_first=not found.in_first, place=place_of(turned))
            )
        if func is F.linear or func in _PRODUCTS:
            x, weight, *others = *args, *named.values()
            found = self._slices.get(id(weight))
            if found is not None and found.in_first is (func is not F.linear):
                return self._deltas.product(found, weight, x, others, call)
        return call()

    def _sliced(self, weight: _Weight, index: Any, result: Tensor) -> Tensor:
        expert = _number(index)
        if expert is None or result.shape != weight.tensor.shape[1:]:
            return result
        count = weight.tensor.shape[0]
        place = place_of(result)
        return self._kept(_Slice(result, weight.mark, weight.in_first, place, expert % count))

    def _kept(self, found: _Slice) -> Tensor:
        self._slices[id(found.tensor)] = found
        return found.tensor


def _is_plain(mark: SiteMark | None) -> bool:
    return mark is not None and mark.is_plain and not mark.made


never_traced(_Products.__torch_function__.__code__)


def _is_ours(mode: object) -> bool:
    """Whether a mode of torch's functions changes no product."""
    return isinstance(mode, (_Products, Readers, DeviceContext))


def _number(index: Any) -> int | None:
    """The number that a single index is; None for slices, masks and several."""
    if isinstance(index, bool) or (isinstance(index, Tensor) and index.dim()):
        return None
    try:
        with DisableTorchFunction():
            return operator.index(index)
    except TypeError:
        return None


class ExpertLoop(ReplacedMethod):
    """The forward of a module of experts, or a router, while an eager forward runs. `weights`:
    names of parameters, and whether they are stored as (in, out)."""

    def __init__(self, module: nn.Module, weights: Mapping[str, bool], runtime: Runtime) -> None:
        super().__init__(module, "forward")
        self.module, self.weights, self._runtime = module, weights, runtime

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        deltas, module = self._runtime.deltas, self.module
        if deltas is None or not deltas.on_top or not all(map(_is_ours, function_modes())):
            return self.original(*args, **kwargs)
        hooks: Iterable[object] = module._forward_hooks.values()
        marks = {hook.weight_name: hook for hook in hooks if isinstance(hook, SiteMark)}
        as_stored = by_lorafx(module)
        made = not as_stored and any(is_parametrized(module, name) for name in self.weights)
        # A parametrisation computes its weight once in a forward, as bitsandbytes has it.
        with cached() if made else nullcontext():
            weights = []
            for name, in_first in self.weights.items():
                parts, mark = held_parts(module, name) if as_stored else [], marks.get(name)
                tensor = parts[0][1] if parts else deltas.weight(module, name, mark)
                weights.append(_Weight(tensor, mark, in_first, bool(parts)))
            with _Products(deltas, weights):
                return self.original(*args, **kwargs)


class ExpertLoops:
    """The `ExpertLoop`s of a program: of modules of experts with sites, or with weights in a
    format, and of those whose weights carry LoRA for their own sake, such as routers."""

    def __init__(self, program: Program) -> None:
        sites = [site for site in program.sites if site.eligible.cls is nn.Module]
        self._calls: list[ExpertLoop] = []
        for _, module in program.graph.modules():
            here = [site for site in sites if site.module is module]
            experts = {w.name: w.transposed for w in expert_weights(module) or ()}
            weights = experts or {s.eligible.weight: s.eligible.transposed for s in here}
            if here or any(in_library_format(module, name) for name in experts):
                self._calls.append(ExpertLoop(module, weights, program.runtime))

    def of_forwards(self) -> Iterator[Replacement]:
        """The forwards, but those that something else has replaced."""
        for call in self._calls:
            if "forward" not in vars(call.module):
                yield call.module, "forward", call
