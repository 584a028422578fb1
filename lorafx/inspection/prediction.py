"""Predicts what lorafx makes of a model, without capturing graphs or reading weights.

    floor(D)      1 + D · bytes of A and B of one adapter / bytes of W

Sites, banks and packs come from the passes over the model. A forward on the meta device, over a
copy of the modules without memory, finds which sites share an input.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lorafx.config import LoraConfig, Options
from lorafx.errors import LorafxWarning, some
from lorafx.inspection.report import Report, Table, over, size
from lorafx.kernels.cost.roofline import factor_elements
from lorafx.model.candidates import by_raw_weight
from lorafx.model.experts import expert_weights
from lorafx.model.module_graph import ModuleGraph, Owner, join, joined, shape_of, storage_key
from lorafx.model.packing import packable
from lorafx.model.refusals import weight_of
from lorafx.model.sites import Group, Site, members_of, parent_of, room_of
from lorafx.passes.attach import allocate_groups
from lorafx.registry import lookup
from lorafx.runtime.marking import build_sites
from lorafx.torch_internals.subclasses import is_traceable_wrapper_subclass
from lorafx.torch_internals.trees import tree_map_only

#: Numbers of distinct adapters in a batch.
DISTINCT = (1, 8, 32)

Floors = tuple[tuple[int, float | None], ...]

NoteKind = Literal["refused", "packs", "training", "not selected", "alias", "tied", "capacity"]


@dataclass(frozen=True)
class PredictedSites:
    """Sites that differ only in the indices of their paths.

    Attributes:
        registered: the registered class that made them sites.
        in_features, out_features: K and N; an embedding's K is the vocabulary.
        experts: E of a parameter of E experts, else 1.
        parts: name and columns of each projection of several; "" for names unknown to adapters.
        dtype: of the base weight, or of its computation.
        weight_bytes: of a base weight as stored.
        own_rows: how many rows of the weight an adapter may replace.
        pack: names of the sites in the predicted node, itself included.
    """

    paths: tuple[str, ...]
    cls: str
    registered: str
    in_features: int
    out_features: int
    experts: int
    parts: tuple[tuple[str, int], ...]
    dtype: str
    weight_bytes: int
    own_rows: int
    pack: tuple[str, ...]

    @property
    def pattern(self) -> str:
        return joined(self.paths)

    @property
    def sizes(self) -> str:
        parts = ", ".join(f"{name or '-'} {columns}" for name, columns in self.parts)
        experts = f"{self.experts} x " if self.experts > 1 else ""
        return f"{experts}{self.in_features} -> {self.out_features}" + (parts and f" [{parts}]")


@dataclass(frozen=True)
class PredictedPack:
    """Equal nodes, each a site or siblings over one weight buffer.

    Attributes:
        paths: the parent module of each node's sites.
        bank_bytes: of a node's part of its bank.
        floors: the least traffic relative to the base's; None for embeddings. Every adapter is
            assumed to have rows at routed experts.
    """

    paths: tuple[str, ...]
    members: tuple[str, ...]
    bank_bytes: int
    floors: Floors

    @property
    def pattern(self) -> str:
        own = " + ".join(self.members)
        return own if self.paths == ("",) else f"{joined(self.paths)}: {own}"


@dataclass(frozen=True)
class Note:
    """A remark before compiling: its kind, modules, and text."""

    kind: NoteKind
    paths: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True)
class Totals:
    """Sums over the model: parameters (each storage once), sites' base weights, and an adapter of
    the largest rank on all sites; `floors` are over the sites alone."""

    sites: int
    nodes: int
    model_bytes: int
    weight_bytes: int
    bank_bytes: int
    adapter_bytes: int
    floors: Floors


Row = TypeVar("Row", PredictedSites, PredictedPack)


@dataclass(frozen=True)
class Prediction(Report):
    """The result of `lorafx.explain(model, lora_config)`, of a model that is not compiled. Only a
    captured graph (`cm.explain()`) shows whether uses of weights are understood and rows are
    proved. `room`: contents of the banks beside factors, not included in floors."""

    model: str
    slots: int
    max_rank: int
    room: tuple[str, ...]
    sites: tuple[PredictedSites, ...]
    packs: tuple[PredictedPack, ...]
    totals: Totals
    notes: tuple[Note, ...]

    def derived(self) -> dict[str, Any]:
        sites = [{**asdict(row), "pattern": row.pattern} for row in self.sites]
        return {
            "sites": sites,
            "packs": [{**asdict(row), "pattern": row.pattern} for row in self.packs],
        }

    @property
    def heading(self) -> str:
        return f"{self.model}, before anything runs"

    def facts(self) -> list[str]:
        totals = self.totals
        floors = ", ".join(
            f"{over(floor)} with {count} adapter{'s' * (count > 1)}"
            for count, floor in totals.floors
        )
        lines = [
            f"weights {size(totals.model_bytes)}, those of the sites {size(totals.weight_bytes)}; "
            f"banks {size(totals.bank_bytes)}; one adapter of rank {self.max_rank} on all sites "
            f"{size(totals.adapter_bytes)}",
            f"least traffic of the sites over the base's: {floors}, adapters of rank "
            f"{self.max_rank}",
        ]
        if self.room:
            lines.append(f"not in these figures: {', '.join(self.room)}")
        return lines

    def tables(self) -> list[Table]:
        beside = "".join(f" and {name}" for name in self.room)
        sites = [
            (
                row.pattern,
                len(row.paths),
                row.cls if row.cls == row.registered else f"{row.cls} as {row.registered}",
                row.sizes + (f", {row.own_rows} rows of an adapter's own" if row.own_rows else ""),
                row.dtype,
                size(row.weight_bytes),
                " + ".join(row.pack) if len(row.pack) > 1 else "alone",
            )
            for row in self.sites
        ]
        packs = [
            (
                pack.pattern,
                len(pack.paths),
                size(pack.bank_bytes),
                *(over(floor) for _, floor in pack.floors),
            )
            for pack in self.packs
        ]
        floors = [f"floor, {count}" for count, _ in self.totals.floors]
        return [
            Table(
                f"sites: {self.totals.sites}",
                ("site", "count", "class", "in -> out", "dtype", "weight, each", "pack"),
                sites,
            ),
            Table(
                f"packs: {self.totals.nodes}, {self.slots} slots of rank up to "
                f"{self.max_rank}{beside}",
                ("pack", "count", "bank, each", *floors),
                packs,
            ),
            Table("notes", ("",), [(note,) for note in self.notes]),
        ]


@dataclass(frozen=True)
class _Node:
    """Sites of a group in a predicted node."""

    group: Group
    sites: tuple[Site, ...]

    @property
    def bank_bytes(self) -> int:
        bytes_, mine = self.group.bank.nbytes, _columns(self.sites)
        return bytes_ * mine // max(_columns(self.group.sites), 1)

    def factor_bytes(self, rank: int) -> int:
        parts = [part for site in self.sites for part in site.parts]
        itemsize = self.group.bank.B.dtype.itemsize
        return factor_elements(parts, rank) * itemsize * self.sites[0].experts

    @property
    def traffic(self) -> tuple[int, int] | None:
        """Bytes of W and of an adapter's factors; None where W is not read as a whole."""
        weights = sum(map(_weight_bytes, self.sites))
        if self.sites[0].eligible.kind == "embedding" or not weights:
            return None
        return weights, self.factor_bytes(self.group.bank.max_rank)

    def pack(self) -> PredictedPack:
        return PredictedPack(
            (parent_of(self.sites),),
            members_of(self.sites),
            self.bank_bytes,
            _floors([self]),
        )


def _columns(sites: Iterable[Site]) -> int:
    return sum(site.out_features + site.in_features for site in sites)


def _floors(nodes: Iterable[_Node]) -> Floors:
    traffic = [node.traffic for node in nodes]
    weights = sum(found[0] for found in traffic if found is not None)
    factors = sum(found[1] for found in traffic if found is not None)
    return tuple((n, 1 + n * factors / weights if weights else None) for n in DISTINCT)


def predict(
    model: nn.Module,
    config: LoraConfig,
    options: Options,
    inputs: Sequence[Mapping[str, Any]],
) -> Prediction:
    """The prediction of `lorafx.explain`. `inputs`: alternative arguments by name, tried in order.
    Raises TargetError as `lorafx.compile`."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", LorafxWarning)
        graph, sites = build_sites(model, config)
    meta = {site: replace(site, device=torch.device("meta")) for site in sites}
    groups = allocate_groups(tuple(meta.values()), config)
    alone = graph.alone() if options.runs("fuse") and options.runs("pack") else frozenset()
    buffers = [len(group.sites) > 1 and packable(group.sites, alone) for group in groups]
    same: Mapping[str, int] = {}
    why = "" if inputs or not any(buffers) else "inputs of the model are not known"
    for named in inputs if any(buffers) else ():
        same, reason = same_inputs(model, sites, named)
        why = reason and (why or reason)
        if not reason:
            break
    nodes = [
        _Node(group, together)
        for group, one_buffer in zip(groups, buffers, strict=True)
        for together in _together(group, one_buffer, None if why else same)
    ]
    members = {site.path: members_of(node.sites) for node in nodes for site in node.sites}
    return Prediction(
        model=type(model).__name__,
        slots=config.max_adapters,
        max_rank=config.max_rank,
        room=room_of(groups),
        sites=_alike(_site_row(site, members[site.path]) for site in sites),
        packs=_alike(node.pack() for node in nodes),
        totals=Totals(
            sites=len(members),
            nodes=len(nodes),
            model_bytes=_module_bytes(model),
            weight_bytes=sum(_weight_bytes(site) for node in nodes for site in node.sites),
            bank_bytes=sum(group.bank.nbytes for group in groups),
            adapter_bytes=sum(node.factor_bytes(config.max_rank) for node in nodes),
            floors=_floors(nodes),
        ),
        notes=notes_of(graph, sites, config, [str(item.message) for item in seen], why),
    )


def _together(
    group: Group, one_buffer: bool, same: Mapping[str, int] | None
) -> list[tuple[Site, ...]]:
    """The group's sites by node: neighbours over one buffer with the `same` input (None: any)."""
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
    return list(map(tuple, found))


def _site_row(site: Site, pack: tuple[str, ...]) -> PredictedSites:
    parts = [(part.name if part.selected else "", part.out_features) for part in site.parts]
    return PredictedSites(
        paths=(site.path,),
        cls=type(site.module).__name__,
        registered="routed experts" if site.expert_weight else site.eligible.cls.__name__,
        in_features=site.in_features,
        out_features=site.out_features,
        experts=site.experts,
        parts=tuple(parts) if len(parts) > 1 else (),
        dtype=site.dtype_name,
        weight_bytes=_weight_bytes(site),
        own_rows=site.own_rows,
        pack=pack,
    )


def _alike(rows: Iterable[Row]) -> tuple[Row, ...]:
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((shape_of(row.paths[0]), replace(row, paths=())), []).append(row)
    return tuple(
        replace(alike[0], paths=tuple(path for row in alike for path in row.paths))
        for alike in found.values()
    )


def _weight_bytes(site: Site) -> int:
    """Stored bytes of the base weight; of all tensors of a module with a packed weight."""
    weight = weight_of(site.module, site.eligible)
    return _module_bytes(site.module) if weight is None else stored_bytes(weight)


def stored_bytes(tensor: Tensor) -> int:
    """Stored bytes of a tensor; of the parts of a wrapper (a quantised weight)."""
    if not is_traceable_wrapper_subclass(tensor):
        return int(tensor.nbytes)
    wrapper: Any = tensor
    names, _ = wrapper.__tensor_flatten__()
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def _module_bytes(module: nn.Module) -> int:
    return sum({storage_key(item): stored_bytes(item) for item in module.parameters()}.values())


def same_inputs(
    model: nn.Module, sites: Sequence[Site], inputs: Mapping[str, Any]
) -> tuple[dict[str, int], str]:
    """Path of each called site -> a number for the input of its first call; equal numbers are one
    tensor. Or why that is not known: the model asks for numbers, or fails."""
    failed = "a forward on the meta device fails"
    for path, module in model.named_modules():
        # Foreign hooks may do anything: accelerate's load weights from disk.
        if module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module):
            own = f"{path or 'the model'} has hooks, or a forward of its own, which would run"
            return {}, f"{failed} ({own})"
    numbers, found = itertools.count(), dict[str, int]()
    seen: dict[int, tuple[Tensor, int]] = {}  # holds the tensors, so that no id comes twice

    def see(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            _, number = seen.setdefault(id(x), (x, next(numbers)))
            found.setdefault(path, number)

    memo: dict[int, Any] = {}  # id of an object of the model -> its copy
    try:
        for module in model.modules():
            held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
            memo.update({id(item): _stand_in(item) for item in held if isinstance(item, Tensor)})
        empty = copy.deepcopy(model, memo)
        for site in sites:
            memo[id(site.module)].register_forward_pre_hook(
                lambda _, args, kwargs, path=site.path: see(path, args, kwargs), with_kwargs=True
            )
        with torch.no_grad():
            empty(**tree_map_only(Tensor, _stand_in, dict(inputs)))
    except Exception as error:  # the model's code may raise anything
        first = (str(error).splitlines() or [""])[0]
        return {}, f"{failed} ({type(error).__name__}: {first:.200})"
    return found, ""


def _stand_in(tensor: Tensor) -> Tensor:
    """A like tensor without memory, made without methods of a subclass."""
    made = torch.empty_strided(
        tuple(tensor.shape), tuple(tensor.stride()), dtype=tensor.dtype, device="meta"
    )
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def notes_of(
    graph: ModuleGraph,
    sites: Sequence[Site],
    config: LoraConfig,
    warned: Iterable[str],
    unknown: str,
) -> tuple[Note, ...]:
    """Remarks before compiling, in order of importance. `warned`: warnings about modules that
    cannot carry LoRA; `unknown`: why shared inputs are unknown, or ""."""
    found = [Note("refused", (), text) for text in warned]
    if unknown:
        text = (
            "packs hold all siblings of one input size, which may be more than share an input: "
            f"{unknown}. Give explain(example_inputs=...) the arguments of a call"
        )
        found.append(Note("packs", (), text))
    if graph.root.training and any(module is not graph.root for module in graph.root.modules()):
        text = "the model is in training mode; call eval() for inference"
        found.append(Note("training", ("",), text))
    found += _not_selected(graph, sites)
    found += [
        Note(
            "alias",
            site.paths,
            f"{site.path} is also {some(site.aliases)}: one module, with one delta",
        )
        for site in sites
        if site.aliases
    ]
    found += _tied(graph, sites)
    if max(DISTINCT) > config.max_adapters:
        text = (
            f"a batch may have {config.max_adapters} adapters at once; figures for more are for "
            f"LoraConfig(max_adapters={max(DISTINCT)})"
        )
        found.append(Note("capacity", (), text))
    return tuple(found)


def _not_selected(graph: ModuleGraph, sites: Sequence[Site]) -> list[Note]:
    taken = {id(site.module) for site in sites}
    carried = {
        id(getattr(site.module, name, None)) for site in sites for name in site.eligible.carries
    }
    alike: dict[tuple[str, type, bool], list[str]] = {}
    for path, module in graph.modules():
        if id(module) in taken or id(module) in carried:
            continue
        known = lookup(module) is not None or expert_weights(module) is not None
        if known or by_raw_weight(module) is not None:
            alike.setdefault((shape_of(path), type(module), known), []).append(path)
    return [
        Note(
            "not selected",
            tuple(paths),
            f"{joined(paths)} ({cls.__name__})"
            + ("" if known else ", a matrix of a class that is not registered: name it to have it"),
        )
        for (_, cls, known), paths in alike.items()
    ]


def _tied(graph: ModuleGraph, sites: Sequence[Site]) -> list[Note]:
    modules = {id(site.module) for site in sites}
    notes = []
    for owners in graph.tied():
        of_sites = [owner for owner in owners if id(owner.module) in modules]
        others = [owner for owner in owners if owner not in of_sites]
        if not of_sites or len({id(owner.module) for owner in owners}) < 2:
            continue
        if others:
            text = (
                f"{some(map(_name, of_sites))} is also {some(map(_name, others))}, where no "
                "delta is added"
            )
        else:
            text = f"{some(map(_name, of_sites))} are one weight; each has deltas of its own"
        notes.append(Note("tied", tuple(owner.path for owner in owners), text))
    return notes


def _name(owner: Owner) -> str:
    return join(owner.path, owner.attribute)
