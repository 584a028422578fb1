"""The prediction for a model: sites, banks and packs, by the passes over the model.

floor(D)      1 + D · bytes of A and B of one adapter / bytes of W

Which sites are given the very same input is found by a forward on the meta device.

Operators there compute shapes and no numbers. What runs is a copy of the modules over stand-ins for
all tensors, without memory: code that keeps something of a call keeps it on the copy.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.config import LoraConfig, Options
from lorafx.errors import LorafxWarning
from lorafx.kernels.cost.cost import factor_elements
from lorafx.model.module_graph import shape_of
from lorafx.model.packing import packable
from lorafx.model.refusals import weight_of
from lorafx.model.sites import Group, Site, members_of, parent_of, room_of
from lorafx.passes.attach import allocate_groups
from lorafx.prepare.marking import build_sites
from lorafx.reports.notes import notes_of
from lorafx.reports.prediction import (
    PredictedPack,
    PredictedSites,
    Prediction,
    Totals,
)
from lorafx.reports.stored_bytes import module_bytes, stored_bytes
from lorafx.torch_internals.trees import tree_map_only


class DryRunError(Exception):
    """The forward cannot be run without numbers; the message says why."""


def same_inputs(
    model: nn.Module, sites: Sequence[Site], inputs: Mapping[str, Any]
) -> dict[str, int]:
    """A number for the input of each site that the forward calls, by path: equal numbers are one
    tensor. A site that is called several times has that of its first call.

    Args:
        inputs: arguments of a call, by name.

    Raises:
        DryRunError: code of the model asks for numbers, or fails otherwise.
    """
    _refuse_hooks(model)
    numbers, found = itertools.count(), dict[str, int]()
    seen: dict[int, tuple[Tensor, int]] = {}  # holds the tensors, so that no id comes twice

    def see(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            _, number = seen.setdefault(id(x), (x, next(numbers)))
            found.setdefault(path, number)

    try:
        empty, memo = _without_numbers(model)
        for site in sites:
            module = memo[id(site.module)]
            module.register_forward_pre_hook(
                lambda _, args, kwargs, path=site.path: see(path, args, kwargs), with_kwargs=True
            )
        with torch.no_grad():
            empty(**tree_map_only(Tensor, _stand_in, dict(inputs)))
    except Exception as error:  # of code of the model, which may be anything
        first = (str(error).splitlines() or [""])[0]
        raise DryRunError(f"{type(error).__name__}: {first:.200}") from error
    return found


def _refuse_hooks(model: nn.Module) -> None:
    """Hooks of others may do anything: accelerate's load weights from a disk."""
    for path, module in model.named_modules():
        hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
        if hooked:
            raise DryRunError(
                f"{path or 'the model'} has hooks, or a forward of its own, which would run"
            )


def _without_numbers(model: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """A copy of the model over stand-ins, and what each object of the model is in it, by `id`."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        memo.update({id(own): _stand_in(own) for own in held if isinstance(own, Tensor)})
    return copy.deepcopy(model, memo), memo


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor like this one without memory. What subclasses do when they are moved is theirs, so
    nothing is asked of them."""
    made = torch.empty_strided(
        tuple(tensor.shape), tuple(tensor.stride()), dtype=tensor.dtype, device="meta"
    )
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


#: Numbers of distinct adapters in a batch that floors are for.
DISTINCT = (1, 8, 32)


@dataclass(frozen=True)
class _Node:
    """Sites that one node is predicted to compute, and its part of their bank."""

    sites: tuple[Site, ...]
    bank_bytes: int
    slot_rank: int
    factor_dtype: torch.dtype


def predict(
    model: nn.Module,
    config: LoraConfig,
    options: Options,
    inputs: Sequence[Mapping[str, Any]],
) -> Prediction:
    """The prediction; `lorafx.explain` says what the arguments are.

    Args:
        inputs: arguments of a call by name; others in case that a forward fails with those.

    Raises:
        TargetError: as `lorafx.compile`.
    """
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", LorafxWarning)
        graph, sites = build_sites(model, config)
    meta = {site: replace(site, device=torch.device("meta")) for site in sites}
    groups = allocate_groups(tuple(meta.values()), config)
    alone = graph.alone() if options.runs("fuse") and options.runs("pack") else frozenset()
    buffers = [len(group.sites) > 1 and packable(group.sites, alone) for group in groups]
    same, why = _same_inputs(model, sites, inputs) if any(buffers) else ({}, "")
    nodes = [
        node
        for group, one_buffer in zip(groups, buffers, strict=True)
        for node in _nodes(group, _together(group, one_buffer, None if why else same))
    ]
    packs = [_pack(node) for node in nodes]
    packed_with = {site.path: members_of(node.sites) for node in nodes for site in node.sites}
    return Prediction(
        model=type(model).__name__,
        slots=config.max_adapters,
        max_rank=config.max_rank,
        slot_rank=config.slot_rank or config.max_rank,
        room=room_of(groups),
        sites=tuple(_site_rows(sites, packed_with)),
        packs=tuple(_alike(packs)),
        totals=_totals(model, groups, nodes, config),
        notes=notes_of(
            graph, sites, config, DISTINCT, [str(one.message) for one in seen], unknown=why
        ),
    )


def _same_inputs(
    model: nn.Module, sites: Sequence[Site], inputs: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, int], str]:
    """A number for the input of each site, or why they are not known."""
    why = "" if inputs else "inputs of the model are not known"
    for named in inputs:
        try:
            return same_inputs(model, sites, named), ""
        except DryRunError as error:
            why = why or f"a forward on the meta device fails ({error})"
    return {}, why


def _together(
    group: Group, one_buffer: bool, same: Mapping[str, int] | None
) -> list[tuple[Site, ...]]:
    """The group's sites by the node that computes them: neighbours over one buffer that share their
    input, which all do where nothing is known (`same` is None)."""
    if not one_buffer:
        return [(site,) for site in group.sites]
    if same is None:
        return [group.sites]
    found: list[list[Site]] = []
    for site in group.sites:
        number = same.get(site.path)
        if found and number is not None and number == same.get(found[-1][-1].path):
            found[-1].append(site)
        else:
            found.append([site])
    return [tuple(own) for own in found]


def _nodes(group: Group, together: Iterable[tuple[Site, ...]]) -> list[_Node]:
    bank = group.bank
    columns = sum(site.out_features + site.in_features for site in group.sites)
    return [
        _Node(
            own,
            bank.nbytes * sum(s.out_features + s.in_features for s in own) // max(columns, 1),
            bank.slot_rank,
            bank.B.dtype,
        )
        for own in together
    ]


def _pack(node: _Node) -> PredictedPack:
    floors = ((count, _floor(node, count)) for count in DISTINCT)
    return PredictedPack(
        (parent_of(node.sites),),
        members_of(node.sites),
        node.bank_bytes,
        tuple((count, None if own is None else 1 + own[1] / own[0]) for count, own in floors),
    )


def _floor(node: _Node, distinct: int) -> tuple[int, int] | None:
    """Bytes of W, and those of A and B of so many adapters."""
    if node.sites[0].eligible.kind == "embedding":
        return None
    weights = sum(_weight_bytes(site) for site in node.sites)
    parts = [part for site in node.sites for part in site.parts]
    each = factor_elements(parts, node.slot_rank) * node.factor_dtype.itemsize
    return (weights, distinct * each * node.sites[0].experts) if weights else None


def _totals(
    model: nn.Module,
    groups: Sequence[Group],
    nodes: Sequence[_Node],
    config: LoraConfig,
) -> Totals:
    floors = []
    for count in DISTINCT:
        pairs = [pair for node in nodes if (pair := _floor(node, count)) is not None]
        weights, factors = sum(own for own, _ in pairs), sum(more for _, more in pairs)
        floors.append((count, 1 + factors / weights if weights else None))
    sites = [site for node in nodes for site in node.sites]
    return Totals(
        sites=len(sites),
        nodes=len(nodes),
        model_bytes=module_bytes(model),
        weight_bytes=sum(_weight_bytes(site) for site in sites),
        bank_bytes=sum(group.bank.nbytes for group in groups),
        adapter_bytes=sum(
            factor_elements([part for site in node.sites for part in site.parts], config.max_rank)
            * node.factor_dtype.itemsize
            * node.sites[0].experts
            for node in nodes
        ),
        floors=tuple(floors),
    )


def _site_rows(
    sites: Iterable[Site], packed_with: dict[str, tuple[str, ...]]
) -> list[PredictedSites]:
    """A row for sites that differ in nothing but the indices of their paths."""
    found: dict[tuple[object, ...], PredictedSites] = {}
    for site in sites:
        own = PredictedSites(
            (site.path,),
            type(site.module).__name__,
            site.eligible.cls.__name__ if site.expert_weight is None else "routed experts",
            site.in_features,
            site.out_features,
            site.experts,
            tuple((part.name if part.selected else "", part.out_features) for part in site.parts)
            if len(site.parts) > 1
            else (),
            site.dtype_name,
            _weight_bytes(site),
            site.own_rows,
            packed_with[site.path],
        )
        key = (shape_of(site.path), replace(own, paths=()))
        before = found.get(key)
        found[key] = own if before is None else replace(before, paths=(*before.paths, site.path))
    return list(found.values())


def _alike(packs: Iterable[PredictedPack]) -> list[PredictedPack]:
    found: dict[tuple[object, ...], list[PredictedPack]] = {}
    for pack in packs:
        found.setdefault((shape_of(pack.paths[0]), replace(pack, paths=())), []).append(pack)
    return [
        replace(own[0], paths=tuple(path for pack in own for path in pack.paths))
        for own in found.values()
    ]


def _weight_bytes(site: Site) -> int:
    """Of the base weight as it is stored: of all that the module holds where it is packed."""
    weight = weight_of(site.module, site.eligible)
    return module_bytes(site.module) if weight is None else stored_bytes(weight)
