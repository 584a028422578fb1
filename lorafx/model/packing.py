"""Packed base weights: the siblings of one group as views of one buffer.

    W = [W_0; W_1; ...]  (ΣN, K),   W_i.data = W[offset_i : offset_i + N_i]

The parameters stay the same objects, with their names, shapes and values, and memory does not grow.
Where parameters get other memory (`model.to(...)`, `load_state_dict(assign=True)`), the next call
packs them again, into the same buffer unless another tensor uses its memory, as after
`p.data, ema[name] = ema[name], p.data`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.errors import CaptureError
from lorafx.model.module_graph import ModuleGraph, writing
from lorafx.model.sites import Group, Site
from lorafx.model.weight_formats import is_dense
from lorafx.torch_internals.compat import mark_fixed_shape
from lorafx.torch_internals.graph_parts import _storage_Use_Count, is_traceable_wrapper_subclass


@dataclass(eq=False)
class PackedGroup:
    """A group whose weights are views of `weight` (ΣN, K), biases of `bias` (ΣN,), 0 if absent."""

    group: Group
    weight: Tensor
    bias: Tensor | None

    def __post_init__(self) -> None:
        #: Each parameter: the dictionary that holds it, its name there, its buffer and rows.
        self._places: list[tuple[dict[str, Any], str, Tensor, slice]] = [
            (site.module._parameters, name, buffer, slice(offset, offset + site.out_features))
            for site, offset in zip(self.group.sites, self.group.offsets, strict=True)
            for name, buffer in ((site.eligible.weight, self.weight), ("bias", self.bias))
            if buffer is not None and site.module._parameters.get(name) is not None
        ]
        self._holders = [parameters for parameters, *_ in self._places]
        self._names = [name for _, name, *_ in self._places]

    def _views(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        return ((holder, name, buffer[rows]) for holder, name, buffer, rows in self._places)

    @property
    def addresses(self) -> list[int]:
        return [view.data_ptr() for _, _, view in self._views()]

    @property
    def intact(self) -> bool:
        """Whether every sibling's parameter still is its view of the packed buffer."""
        return _lie_at(self._holders, self._names, self.addresses)

    @property
    def fits(self) -> bool:
        for parameters, name, view in self._views():
            value = parameters.get(name)
            if value is None or is_traceable_wrapper_subclass(value):
                return False
            if (value.shape, value.dtype, value.device) != (view.shape, view.dtype, view.device):
                return False
        return True

    def holds(self, site: Site) -> bool:
        """Whether the weight and bias of `site` still are their views of the buffers."""
        parameters = site.module._parameters
        views = {name: view for holder, name, view in self._views() if holder is parameters}
        return (parameters.get("bias") is None or "bias" in views) and all(
            _layout(parameters.get(name)) == _layout(view) for name, view in views.items()
        )

    def fill(self) -> None:
        """Copy the parameters into the buffers and make them views of these. A buffer whose memory
        another tensor uses gets new memory, since that tensor may be assigned back later."""
        buffers = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
        for tensor in [tensor for tensor in buffers if self._is_used_elsewhere(tensor)]:
            with torch.inference_mode(tensor.is_inference()):
                tensor.data = torch.zeros_like(tensor)
        for parameters, name, view in self._views():
            parameter = parameters[name]
            with writing(view):
                view.copy_(parameter)
            parameter.data = view

    def _is_used_elsewhere(self, buffer: Tensor) -> bool:
        references = _reference_count(buffer) - _reference_count(buffer.new_empty(0))
        for parameters, name, packed, rows in self._places:
            references -= packed is buffer and _layout(parameters[name]) == _layout(packed[rows])
        return references > 0


def _reference_count(tensor: Tensor) -> int:
    """References to the tensor's memory, that of this query included."""
    return _storage_Use_Count(tensor.untyped_storage()._cdata)


def _layout(tensor: Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    # A dimension of one entry may have any stride.
    strides = [n for n, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return (tensor.shape, strides, tensor.data_ptr())


def _lie_at(
    holders: Sequence[Mapping[str, Any]], names: Sequence[str], addresses: Sequence[int]
) -> bool:
    parameters = map(operator.getitem, holders, names)
    try:
        return list(map(Tensor.data_ptr, parameters)) == addresses
    except (KeyError, TypeError, RuntimeError):  # removed, None, or of a class without an address
        return False


def pack_weights(
    graph: ModuleGraph, group: Group, unshared: frozenset[int] | None = None
) -> PackedGroup | None:
    """A buffer for the group's base weights, which become its views when the first graph needs
    them (`PackWatch.pack`), and now where that would take the memory of all buffers at once: on a
    CPU an empty buffer takes none. Returns None for fewer than two siblings, and where they are not
    `packable`. `unshared` is `graph.unshared()`, computed here if absent."""
    sites = group.sites
    if len(sites) < 2:
        return None
    if not packable(sites, graph.unshared() if unshared is None else unshared):
        return None
    weights: list[Any] = [site.module._parameters[site.eligible.weight] for site in sites]
    if any(weight.is_meta for weight in weights):  # there are no numbers to put side by side
        return None
    has_bias = any(site.module._parameters.get("bias") is not None for site in sites)
    rows = sum(site.out_features for site in sites)
    # Parameters made in inference mode need a buffer made in it: one cannot be a view of the other.
    with torch.inference_mode(weights[0].is_inference()):
        buffer = weights[0].new_empty((rows, sites[0].in_features))
        packed = PackedGroup(group, buffer, buffer.new_zeros(rows) if has_bias else None)
    if not buffer.is_cpu:
        packed.fill()
    for tensor in (packed.weight, packed.bias):
        if tensor is not None:
            mark_fixed_shape(tensor)
    return packed


class PackWatch:
    """Packs parameters, and then detects by addresses that they left their packs: 13 µs a call for
    64 packs."""

    def __init__(self, packs: Sequence[PackedGroup]) -> None:
        self._packs = packs
        self.packed = False
        self._holders = [holder for packed in packs for holder in packed._holders]
        self._names = [name for packed in packs for name in packed._names]
        self._record_addresses()

    def _record_addresses(self) -> None:
        self._addresses = [address for packed in self._packs for address in packed.addresses]

    @property
    def nbytes(self) -> int:
        return sum(packed.weight.nbytes for packed in self._packs)

    @property
    def intact(self) -> bool:
        return _lie_at(self._holders, self._names, self._addresses)

    def pack(self) -> None:
        """Make the parameters views of their packs, before a graph is made."""
        self.packed = True
        self.check()

    def check(self) -> None:
        """As `check_packed`. Parameters that were not packed yet are only looked at."""
        if not self.packed:
            _refuse(next((packed for packed in self._packs if not packed.fits), None))
        elif not self.intact:
            check_packed(self._packs)
            self._record_addresses()


def check_packed(packs: Iterable[PackedGroup]) -> None:
    """Make parameters views of the packs again; CaptureError if the model was moved or cast."""
    split = [packed for packed in packs if not packed.intact]
    _refuse(repack(split) if split else None)


def _refuse(misfit: PackedGroup | None) -> None:
    if misfit is not None:
        raise CaptureError(
            f"the weights of {misfit.group.sites[0].path} and its siblings have changed "
            "shape, dtype, device or format, or were removed, after lorafx was given the "
            f"model. Graphs and banks are for {misfit.weight.dtype}: convert the model back, or "
            "detach() it and call lorafx.compile on the changed model; cm.to() converts nothing"
        )


def repack(packs: Sequence[PackedGroup]) -> PackedGroup | None:
    """Pack the parameters' present values anew. Returns the first group whose buffers cannot hold
    them; nothing is changed then."""
    misfit = next((packed for packed in packs if not packed.fits), None)
    if misfit is None:
        for packed in packs:
            packed.fill()
    return misfit


def packable(sites: Sequence[Site], unshared: frozenset[int]) -> bool:
    """Whether the weights of sibling sites may lie in one buffer: plain contiguous 2-D (out, in)
    `unshared` parameters of equal dtype, device and `requires_grad`; and their biases."""
    weights = []
    for site in sites:
        if site.eligible.kind != "linear" or site.eligible.transposed:
            return False
        weight = site.module._parameters.get(site.eligible.weight)
        if weight is None or not _is_plain(unshared, weight, (site.out_features, site.in_features)):
            return False
        weights.append(weight)
        bias = site.module._parameters.get("bias")
        if getattr(site.module, "bias", None) is not bias:  # a bias that is no parameter
            return False
        if bias is not None:
            matches_weight = (bias.dtype, bias.device) == (weight.dtype, weight.device)
            if not matches_weight or not _is_plain(unshared, bias, (site.out_features,)):
                return False
    return len({(w.dtype, w.device, w.requires_grad, w.is_inference()) for w in weights}) == 1


def _is_plain(unshared: frozenset[int], parameter: nn.Parameter, shape: tuple[int, ...]) -> bool:
    return (
        not is_traceable_wrapper_subclass(parameter)
        and tuple(parameter.shape) == shape
        and parameter.is_contiguous()
        and is_dense(parameter)
        and parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
        and id(parameter) in unshared
    )
