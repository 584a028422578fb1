"""The prediction for a model: sites and banks by the passes over the model, times by cost models.

    floor(D)      1 + D · bytes of A and B of one adapter / bytes of W
    modelled(D)   seconds(strategy, D) / seconds(vendor's product)          on a GPU

The strategy is the one that the pass `plan` would choose for so many rows, by the same cost model,
as far as modules alone decide it. One graph serves every mix, so it is the same for each D.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.capture.lowering import resolved
from lorafx.config import LoraConfig, Options
from lorafx.errors import ConfigError, LorafxWarning, nearest
from lorafx.kernels.cost.chips import DEFAULT_CHIP, NAMED_CHIPS, Chip, chip_of
from lorafx.kernels.cost.cost import (
    FUSED,
    GPU_STRATEGIES,
    estimate,
    factor_elements,
    work_of,
)
from lorafx.kernels.cost.work import Work
from lorafx.kernels.triton.triton_build import CONCAT
from lorafx.kernels.triton.triton_checks import adjacent
from lorafx.model.forward_check import is_dense
from lorafx.model.packing import packable
from lorafx.model.quantized import is_stored
from lorafx.model.refusals import weight_of
from lorafx.model.repeated import shape_of
from lorafx.model.sites import Group, Site, members_of, parent_of, room_of
from lorafx.passes.attach import allocate_groups
from lorafx.prepare.marking import build_sites
from lorafx.reports.dry_run import DryRunError, same_inputs
from lorafx.reports.notes import notes_of
from lorafx.reports.prediction import (
    Overhead,
    PredictedPack,
    PredictedSites,
    Prediction,
    Totals,
)
from lorafx.reports.stored_bytes import module_bytes, stored_bytes

#: Numbers of distinct adapters in a batch that are predicted.
DISTINCT = (1, 8, 32)
#: Requests of the decode step that is predicted.
ROWS = 64


@dataclass(frozen=True)
class _Place:
    """Where the model would run: a chip for a GPU, None for a CPU."""

    chip: Chip | None
    options: Options

    @property
    def name(self) -> str:
        return "cpu" if self.chip is None else self.chip.name


@dataclass(frozen=True)
class _Node:
    """Sites that one node is predicted to compute, and its part of their bank."""

    sites: tuple[Site, ...]
    bank_bytes: int
    slot_rank: int
    slots: int
    factor_dtype: torch.dtype


@dataclass(frozen=True)
class _Choice:
    """How a node would be computed. With a cost model: seconds of the base's product, and of base
    and deltas for each of `DISTINCT`."""

    strategy: str
    reason: str = ""
    base: float = 0.0
    seconds: tuple[float, ...] = ()


def predict(
    model: nn.Module,
    config: LoraConfig,
    options: Options,
    device: torch.device | str | None,
    rows: int,
    inputs: Sequence[Mapping[str, Any]],
) -> Prediction:
    """The prediction; `lorafx.explain` says what the arguments are.

    Args:
        inputs: arguments of a call by name; others in case that a forward fails with those.

    Raises:
        ConfigError: no such device, or `rows` is not positive.
        TargetError: as `lorafx.compile`.
    """
    if rows < 1:
        raise ConfigError(f"rows = {rows}: a call has at least one row of x")
    place = _place(model, options, device)
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
    choices = [_choice(node, place, rows) for node in nodes]
    packs = [_pack(node, choice) for node, choice in zip(nodes, choices, strict=True)]
    packed_with = {site.path: members_of(node.sites) for node in nodes for site in node.sites}
    return Prediction(
        model=type(model).__name__,
        device=place.name,
        lowering=place.options.lowering,
        rows=rows,
        slots=config.max_adapters,
        max_rank=config.max_rank,
        slot_rank=config.slot_rank or config.max_rank,
        room=room_of(groups),
        sites=tuple(_site_rows(sites, packed_with)),
        packs=tuple(_alike(packs)),
        totals=_totals(model, groups, nodes, choices, config),
        notes=notes_of(
            graph, sites, config, DISTINCT, [str(one.message) for one in seen], unknown=why
        ),
    )


def _place(model: nn.Module, options: Options, device: torch.device | str | None) -> _Place:
    chip = NAMED_CHIPS.get(str(device).upper())
    if chip is not None:
        return _Place(chip, resolved(options, torch.device("cuda")))
    if device is None:
        found = {tensor.device for tensor in model.parameters()} - {torch.device("meta")}
        device = next(iter(found)) if found else "cuda"  # nothing says where it will be
    try:
        own = torch.device(device)
    except RuntimeError as error:
        known = ["cpu", "cuda", *NAMED_CHIPS]
        near = nearest(str(device).lower(), map(str.lower, known))
        raise ConfigError(
            f"device {device!r} is none that lorafx can model{near}; give one of {', '.join(known)}"
        ) from error
    settled = resolved(options, own)
    if own.type != "cuda":
        return _Place(None, settled)
    return _Place(chip_of(own) if torch.cuda.is_available() else DEFAULT_CHIP, settled)


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
            len(bank.ranks) // bank.experts,
            bank.B.dtype,
        )
        for own in together
    ]


def _pack(node: _Node, choice: _Choice) -> PredictedPack:
    return PredictedPack(
        (parent_of(node.sites),),
        members_of(node.sites),
        node.bank_bytes,
        choice.strategy,
        choice.reason,
        tuple(
            Overhead(
                count,
                None if floor is None else 1 + floor[1] / floor[0],
                choice.seconds[at] / choice.base if choice.base else None,
            )
            for at, count in enumerate(DISTINCT)
            for floor in (_floor(node, count),)
        ),
    )


def _floor(node: _Node, distinct: int) -> tuple[int, int] | None:
    """Bytes of W, and those of A and B of so many adapters."""
    if node.sites[0].eligible.kind == "embedding":
        return None
    weights = sum(_weight_bytes(site) for site in node.sites)
    parts = [part for site in node.sites for part in site.parts]
    each = factor_elements(parts, node.slot_rank) * node.factor_dtype.itemsize
    return (weights, distinct * each * node.sites[0].experts) if weights else None


def _work(node: _Node, place: _Place, rows: int) -> Work | None:
    """The node as the GPU's cost model sees it; None where it does not know such nodes: on a CPU,
    routed experts (how many tokens each gets is not known), embeddings, convolutions, weights that
    are stored in a format."""
    if place.chip is None or place.options.lowering != "triton":
        return None
    for site in node.sites:
        if site.eligible.kind != "linear" or is_stored(site.module, site.eligible):
            return None
    parts = [part for site in node.sites for part in site.parts]
    dtype = node.sites[0].dtype
    return work_of(parts, rows, node.slots, node.slot_rank, dtype, place.chip)


def _choice(node: _Node, place: _Place, rows: int) -> _Choice:
    kinds = {site.eligible.kind for site in node.sites}
    pinned = {place.options.plan[s.path] for s in node.sites if s.path in place.options.plan}
    work = _work(node, place, rows)
    if pinned:
        return _timed(" or ".join(sorted(pinned)), "pinned", work, rows)
    if place.options.lowering == "reference" or "conv" in kinds:
        return _Choice("aten")
    if place.options.lowering == "inductor":
        return _Choice("generated" if place.chip is None else "aten")
    if kinds == {"embedding"}:
        return _Choice("embedding", "rows are gathered one by one")
    if work is None:
        return _Choice("", "the cost model does not know it; the graph decides")
    weight = weight_of(node.sites[0].module, node.sites[0].eligible)
    for name, modelled in estimate(work).items():
        if modelled.refusal or name == CONCAT or (name in FUSED and not _fusable(weight)):
            continue
        return _timed(name, f"modelled {modelled} at {rows} rows", work, rows)
    return _timed("segments", "", work, rows)


def _timed(name: str, reason: str, work: Work | None, rows: int) -> _Choice:
    if work is None or name not in GPU_STRATEGIES:
        return _Choice(name, reason)
    cost = GPU_STRATEGIES[name]
    seconds = tuple(cost(replace(work, distinct=min(count, rows))) for count in DISTINCT)
    return _Choice(name, reason, work.vendor(), seconds)


def _fusable(weight: Tensor | None) -> bool:
    """Whether a kernel can read the weight as it lies."""
    return weight is not None and is_dense(weight) and adjacent(weight)


def _totals(
    model: nn.Module,
    groups: Sequence[Group],
    nodes: Sequence[_Node],
    choices: Sequence[_Choice],
    config: LoraConfig,
) -> Totals:
    timed = [choice for choice in choices if choice.seconds]
    base = sum(choice.base for choice in timed)
    overheads = []
    for at, count in enumerate(DISTINCT):
        floors = [pair for node in nodes if (pair := _floor(node, count)) is not None]
        weights, factors = sum(own for own, _ in floors), sum(more for _, more in floors)
        overheads.append(
            Overhead(
                count,
                1 + factors / weights if weights else None,
                sum(choice.seconds[at] for choice in timed) / base if base else None,
            )
        )
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
        overheads=tuple(overheads),
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
