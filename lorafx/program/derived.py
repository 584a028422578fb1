"""Tensors that contain a site's weight, or a part of it, under another name.

Serving code cuts `kv_b_proj.weight` into W_UK and W_UV after loading, as views or, after
dequantisation or `contiguous`, as copies. Graphs that multiply by them bypass the weight's module.

    views     are found by storage: sizes, strides and offset in the weight's storage
    copies    are found by value: all rows of the tensor are rows of W at regular distances, or all
              values are those of an embedding's or a convolution's weight

`match` refuses the site of a view without a regular form. Other copies (scaled, rounded, reordered)
are not recognised; `match` refuses an unused site if such a tensor may replace its weight. Eager
mode looks for the same tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lorafx.errors import ConfigError, MatchError
from lorafx.model.made_weights import maker_of
from lorafx.model.module_graph import ByStorage, Holder
from lorafx.model.quantized import dequantize, readable
from lorafx.model.sites import Site
from lorafx.model.weight_formats import is_dense
from lorafx.ownership.memory import geometry_of
from lorafx.program.inputs import Derived, FrameInput
from lorafx.program.weight_forms import copied_form, strided_form
from lorafx.registry import lookup
from lorafx.torch_internals.graph_parts import is_traceable_wrapper_subclass, unset_fake_temporarily
from lorafx.torch_internals.transforms import wrapped_by_transform

#: How many distinct values a tensor needs to be compared with weights.
DISTINCT = 16
_ROUNDED = (torch.int8, torch.uint8)


class MarkedWeights(Protocol):
    """What `DerivedTensors` has to know of a program."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def sites(self) -> Sequence[Site]: ...

    def weight_of(self, site: Site) -> Tensor | None: ...

    def is_result(self, tensor: Tensor) -> bool: ...


class DerivedTensors:
    """Finds the weights of sites in other tensors of a program."""

    def __init__(self, program: MarkedWeights) -> None:
        self._owner = weakref.ref(program)  # no cycle: models are freed with their last reference
        self._compared = WeakTensorKeyDictionary()
        self._views = WeakTensorKeyDictionary()
        self._parts = WeakTensorKeyDictionary()
        self._held: dict[int, Holder] = {}

    @property
    def _program(self) -> MarkedWeights:
        program = self._owner()
        assert program is not None
        return program

    def of(self, tensor: Tensor) -> Derived | None:
        """The weight in `tensor`, if it is a view or has been compared before."""
        if tensor in self._compared:
            return self._compared[tensor]
        if isinstance(tensor, nn.Parameter):
            return None
        if tensor not in self._views:
            self._views[tensor] = self._by_storage(tensor, self._sites_by_storage())
        return self._views[tensor]

    def look(self, tensor: Tensor) -> Derived | None:
        """The weight in `tensor`, copies included. Each tensor is compared once, and so is each
        view of one: a forward makes new views in every call. A view of a copy counts as one: eager
        mode sees no attribute, only what is made of it, such as its broadcast by `matmul`."""
        whole = tensor._base
        if whole is None or is_traceable_wrapper_subclass(whole):  # its views may lack operators
            return self._look(tensor if whole is None else whole)
        if isinstance(whole, nn.Parameter):
            holder = self._holder(whole)
            if holder is not None and holder.is_own_weight:
                return self._look(whole)
        parts = self._parts.setdefault(whole, {})
        key = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
        if key not in parts:
            once = [slice(1) if not stride else slice(None) for stride in tensor.stride()]
            parts[key] = self._look(tensor[tuple(once)].squeeze()) or self._look(whole)
        return parts[key]

    def _look(self, tensor: Tensor) -> Derived | None:
        if tensor not in self._compared:
            self._compare([tensor])
        return self._compared[tensor]

    def of_attribute(self, tensor: Tensor) -> Derived | None:
        """`look`, if a module of the model holds `tensor`."""
        if tensor not in self._compared and self._holder(tensor) is None:
            self._compared[tensor] = None
        return self._look(tensor)

    def inputs(
        self, examples: Sequence[Any], known: Mapping[int, FrameInput], data: Mapping[int, Any]
    ) -> dict[int, Derived]:
        """A graph's inputs that contain weights of sites, by identity. Earlier graphs' results
        count as `data` of the call: other uses of a weight there would have been refused."""
        candidates = [
            example
            for example in examples
            if isinstance(example, Tensor)
            and example.numel() > 1
            and id(example) not in data
            and not self._program.is_result(example)
            and (id(example) not in known or known[id(example)].kind == "state")
        ]
        return self._compare(candidates)

    def _compare(self, tensors: Sequence[Tensor]) -> dict[int, Derived]:
        """The weights in these tensors, by identity."""
        weights: dict[int, Derived] = {}
        if not tensors:
            return weights
        with unset_fake_temporarily(), torch.no_grad():
            storages = self._sites_by_storage()
            for tensor in tensors:
                holder, derived = self._holder(tensor), None
                if holder is None or not holder.is_own_weight:
                    derived = self._by_storage(tensor, storages)
                    if derived is None and is_numbers(tensor):
                        derived = self._by_value(tensor, holder)
                self._compared[tensor] = derived
                if derived is not None:
                    weights[id(tensor)] = derived
        return weights

    def _holder(self, tensor: Tensor) -> Holder | None:
        """The first attribute of a module that holds the tensor."""
        for _ in range(2):  # as it was, and looked at anew
            holder = self._held.get(id(tensor))
            if holder is not None and getattr(holder.module, holder.attribute, None) is tensor:
                return holder
            self._held = {}
            for path, module in self._program.model.named_modules():
                for name, value in named_tensors(module):
                    self._held.setdefault(id(value), Holder(path, module, name))
        return None

    def _likely_sites(self, holder: Holder | None) -> Iterator[Site]:
        """Sites of which a tensor is a copy rather than of others with the same values: its
        holder's, or a child, a sibling, or a sibling of the parent of the holder."""
        if holder is None:
            return
        own, near = lookup(holder.module) is not None, holder.path.rpartition(".")[0]
        for site in self._program.sites:
            if site.module is holder.module or (
                not own and any(is_near(path, near) for path in site.paths)
            ):
                yield site

    def _sites_by_storage(self) -> ByStorage[Site]:
        weights = ((site, self._program.weight_of(site)) for site in self._program.sites)
        return ByStorage(
            (site, weight)
            for site, weight in weights
            if weight is not None and (weight.dim() == 2 or site.eligible.kind == "conv")
        )

    def _by_storage(self, tensor: Tensor, sites: ByStorage[Site]) -> Derived | None:
        for site, weight in sites.overlapping(tensor):
            transposed = site.eligible.transposed
            form = None
            if tensor.dtype == weight.dtype and weight.dim() == 2:
                places = geometry_of(tensor), geometry_of(weight)
                form = strided_form(*places, transposed=transposed)
            first, second = len(weight), weight.numel() // len(weight)
            shape = (second, first) if transposed else (first, second)
            return Derived(self._tied(site), form, shape, copied=False)
        return None

    def _by_value(self, tensor: Tensor, holder: Holder | None) -> Derived | None:
        if not is_varied(tensor):
            return None
        found = next(self._copies(tensor, self._likely_sites(holder)), None)
        if found is None:
            copies = list(self._copies(tensor, self._program.sites))
            weights = {id(self._program.weight_of(copy.sites[0])) for copy in copies}
            if len(weights) > 1:  # it may be a copy of either
                sites = tuple(dict.fromkeys(site for copy in copies for site in copy.sites))
                return replace(copies[0], sites=sites, form=None)
            found = copies[0] if copies else None
        return found

    def _copies(self, tensor: Tensor, sites: Iterable[Site]) -> Iterator[Derived]:
        for site in sites:
            size, form = site.in_features * site.out_features, None
            rows = site.eligible.kind == "linear" and tensor.dim() > 1
            weight = self._program.weight_of(site)
            if weight is not None and wrapped_by_transform(weight):
                raise MatchError(f"{site.path}: its weight is another's in a transform")
            if rows and site.in_features in tensor.shape and tensor.numel() <= size:
                weight = dense_weight(site)
                if weight is not None and weight.device == tensor.device:
                    form = copied_form(tensor, weight)
            if weight is None or (form is None and not _same_values(tensor, weight)):
                continue
            shape = (weight.shape[0], weight.numel() // weight.shape[0])
            yield Derived(self._tied(site), form, shape, copied=True)

    def _tied(self, site: Site) -> tuple[Site, ...]:
        weight = self._program.weight_of(site)
        return tuple(
            other
            for other in self._program.sites
            if other is site or (weight is not None and self._program.weight_of(other) is weight)
        )


def _same_values(tensor: Tensor, weight: Tensor) -> bool:
    """Whether all values of a weight of any sizes are those of the tensor, in order."""
    same = tensor.numel() == weight.numel() and tensor.device == weight.device
    if not same or not is_numbers(weight):
        return False
    return torch.equal(weight.reshape(-1).to(tensor.dtype), tensor.reshape(-1))


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters, buffers and tensor attributes by name."""
    for place in (module._parameters, module._buffers, vars(module)):
        for name, value in place.items():
            if isinstance(value, Tensor):
                yield name, value


def is_near(path: str, module: str) -> bool:
    """Whether `path` is a child or a grandchild of `module`."""
    inside = not module or path.startswith(f"{module}.")
    return inside and path[len(module) + bool(module) :].count(".") <= 1


class HeldTensor(NamedTuple):
    """A tensor that a forward may compute with, and where it is held; `value` has its sizes."""

    tensor: Tensor
    value: Tensor
    holder: Holder | None
    label: str


def replacement(
    site: Site, near: str, tensors: Iterable[HeldTensor], *, in_parts: bool = False
) -> str | None:
    """Why a forward of the module at `near` may compute with one of these tensors in the place of
    its child `site`, no use of whose weight is known, or only those `in_parts`; None if it does
    not."""
    used = "parts of its weight are used" if in_parts else "nothing uses its weight"
    computes = f"{used}, but {near or 'the model'} computes with"
    labels = (item.label for item in tensors if _replaces(site, near, item))
    return next((f"{computes} {label}, which may have been made from it" for label in labels), None)


def _replaces(site: Site, near: str, held: HeldTensor) -> bool:
    """With any matrix if the weight is unreadable, else with an attribute, a buffer or an item of a
    container of as many columns."""
    value, holder = held.value, held.holder
    if site.eligible.kind != "linear" or maker_of(site.module, site.eligible.weight):
        return False
    if value.dim() < 2 or not (value.is_floating_point() or value.dtype in _ROUNDED):
        return False
    if holder is not None and (holder.is_own_weight or not is_near(str(holder), near)):
        return False
    fits = not isinstance(held.tensor, nn.Parameter) and site.in_features in value.shape
    return fits or not has_numbers(site)


def is_numbers(tensor: Tensor) -> bool:
    """Whether a tensor holds plain, dense floating-point numbers."""
    return is_dense(tensor) and not tensor.is_meta and not is_traceable_wrapper_subclass(tensor)


def has_numbers(site: Site) -> bool:
    """Whether `dense_weight` can read the weight, without reading it."""
    return readable(site.module, site.eligible)


def dense_weight(site: Site) -> Tensor | None:
    """W (N, K) as dense numbers, from any readable format; else None."""
    dense = numbers_of(site.module)
    sizes = (site.out_features, site.in_features)
    return dense if dense is not None and tuple(dense.shape) == sizes else None


def numbers_of(module: nn.Module, attribute: str | None = None) -> Tensor | None:
    """The module's weight, or another parameter, as dense numbers; None if it is not readable."""
    try:
        dense = dequantize(module, attribute)
    except ConfigError:
        return None
    return dense if is_numbers(dense) else None


def is_varied(tensor: Tensor) -> bool:
    """Whether there are at least `DISTINCT` values among some of the tensor's entries."""
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // (8 * DISTINCT))
    return len(flat[::step].unique()) >= DISTINCT
