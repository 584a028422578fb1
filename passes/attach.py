"""read: the meaning of adapters' saved tensors on the sites; attach: a bank for each group of
siblings, a mark on each site; load: the store over the banks.

    name → saved tensors   →   Adapter: part path → A, B, scale       →   AdapterStore
    (Site, ...)   →   groups by (parent, kind, K, dtype, device), a Bank each   →   SiteMarks

`read` finds all errors in files, before the model changes. Siblings are sites that may share an
input (q/k/v, gate/up); if they do, they share a shrink through their bank. Embeddings,
convolutions, and sites with replaceable rows are groups of one. Only the model's forward hooks
change, and `Attachment.detach` removes exactly those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import nn

from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.adapter_store.store import AdapterStore, info
from lorafx.config import LoraConfig
from lorafx.errors import CaptureError, ConfigError
from lorafx.interrupts import Rollback
from lorafx.model.attachment import Attachment, marks_on
from lorafx.model.bank import Bank, SharedPair
from lorafx.model.convolutions import window_of
from lorafx.model.extras import BIAS_KINDS
from lorafx.model.made_weights import maker_of
from lorafx.model.marks import RowHook, SiteMark
from lorafx.model.module_graph import ModuleGraph, joined_lines
from lorafx.model.quantized import QuantisedModules, is_stored
from lorafx.model.runtime import Runtime
from lorafx.model.sites import Group, Site
from lorafx.placements import LocalForward, install
from lorafx.program.program import Preparation
from lorafx.progress import progress
from lorafx.torch_internals.compat import mark_fixed_shape


@dataclass(frozen=True)
class Read:
    """Finds the meaning of each adapter's saved tensors on the sites.

    Raises CheckpointError, UnsupportedAdapterError or CapacityError, which name the tensor.
    """

    name: ClassVar[str] = "read"

    def run(self, model: Preparation) -> int:
        for name in list(model.saved):
            with progress(f"reading adapter {name}"):
                adapter = read_adapter(
                    model.saved.pop(name),  # frees the saved tensors once they are read
                    name,
                    model.sites,
                    model=model.model,
                    max_rank=model.config.max_rank,
                    lora_config=model.config,
                    strict=model.options.strict,
                )
                model.adapters.append(adapter)
                count = len(adapter.own_weights)
                rows = f"; weights with rows of its own: {count}" if count else ""
                model.notes.append(
                    f"{name} from {adapter.source}: rank {adapter.rank}; modules or parts with "
                    f"factors: {len(adapter.weights)}{rows}"
                )
        return len(model.adapters)


@dataclass(frozen=True)
class Attach:
    """Allocates a bank for each group of siblings, and marks each site.

    Raises CaptureError, before any change, for a marked or compiled model.
    """

    name: ClassVar[str] = "attach"

    def run(self, model: Preparation) -> int:
        before = len(model.rollback)
        model.attachment = _attach(model.graph, model.sites, model.config, model.rollback)
        config = model.config
        model.notes += joined_lines(
            (
                group.parent,
                f"one bank for {' + '.join(group.members)}, {config.max_adapters} slots of rank "
                f"up to {config.max_rank}, {group.bank.nbytes / 1e6:.3g} MB",
            )
            for group in model.attachment.groups
        )
        return len(model.rollback) - before


@dataclass(frozen=True)
class LoadAdapters:
    """Makes the store over the banks, with the adapters that were read."""

    name: ClassVar[str] = "load"

    def run(self, model: Preparation) -> int:
        assert model.attachment is not None
        config = model.config
        model.store = AdapterStore(
            model.attachment.groups, config.max_adapters, max_host_bytes=config.max_host_bytes
        )
        for adapter in model.adapters:
            model.store.load(adapter, model.origins.get(adapter.name))
            size = info(model.store, adapter.name).nbytes / 1e6
            model.notes.append(f"{adapter.name}: {size:.3g} MB of host memory, no slot yet")
        return len(model.adapters)


def _attach(
    graph: ModuleGraph, sites: Sequence[Site], config: LoraConfig, rollback: Rollback
) -> Attachment:
    _refuse_marked(graph)
    _refuse_compiled(graph, sites)
    quantised = QuantisedModules.of(module for _, module in graph.modules())
    quantised.settle()
    runtime = Runtime(config.max_adapters, _one_device(sites))
    groups = allocate_groups(sites, config)
    marks = {
        site.path: _mark(site, index, group, runtime)
        for group in groups
        for index, site in enumerate(group.sites)
    }
    # A call may skip parts of the model, so in each large part one mark is its first.
    parts = {tuple(site.path.split(".")[:2]): site.path for site in reversed(sites)}
    for path in parts.values():
        marks[path].first = True
    # Hooks are prepended, so that hooks of users see the output with its delta.
    hooks: list[tuple[nn.Module, SiteMark | RowHook]] = []
    for site in sites:
        marked = site.marked
        if isinstance(marked, LocalForward):
            rollback.add(install(site.module, marked))
        hooks.append((marked, marks[site.path]))
    site_modules = {id(site.module) for site in sites}
    hooks += [
        (module, RowHook(runtime, entry.sizes(module)[1], entry.kind == "embedding"))
        for module, entry in quantised.entries
        if id(module) not in site_modules
    ]
    for module, mark in hooks:
        handle = module.register_forward_hook(mark, with_kwargs=True, prepend=True)
        rollback.add(handle.remove)
    return Attachment(groups, runtime, marks, rollback)


def allocate_groups(sites: Sequence[Site], config: LoraConfig) -> tuple[Group, ...]:
    """Groups of siblings with zero banks on the sites' device, which may be meta."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        key: object = (
            site.path
            if not site.eligible.is_linear or site.own_rows
            else (site.path.rpartition(".")[0], site.in_features, site.dtype, site.device)
        )
        groups.setdefault(key, []).append(site)
    pairs: dict[object, SharedPair] = {}
    return tuple(_group(items, config, _pair_for(items[0], pairs)) for items in groups.values())


def _pair_for(site: Site, pairs: dict[object, SharedPair]) -> SharedPair | None:
    """The site's pair in its dtype and on its device: views of one of the `pairs` for all sites."""
    if site.pair is None:
        return None
    key = site.dtype, site.device
    if key not in pairs:
        with torch.inference_mode(False):
            pairs[key] = SharedPair(*(t.to(site.device, site.dtype) for t in site.pair))
    return pairs[key].of(site.in_features, site.out_features)


def _group(siblings: list[Site], config: LoraConfig, pair: SharedPair | None) -> Group:
    first = siblings[0]
    sizes = tuple(site.out_features for site in siblings)
    parts = tuple(part for site in siblings for part in site.parts)
    bank = Bank.allocate(
        kind=first.eligible.kind,
        slots=config.max_adapters,
        rank=config.max_rank * first.terms,
        in_features=first.in_features,
        out_features=tuple(part.out_features for part in parts),
        dtype=config.dtype or first.dtype,
        device=first.device,
        experts=first.experts,
        dora=config.use_dora and first.expert_weight is None,
        biases=config.lora_bias and first.eligible.kind in BIAS_KINDS,
        own_rows=first.own_rows,
        own_weights=min(config.max_own_weights or config.max_adapters, config.max_adapters),
        own_dtype=first.dtype,
        pair=pair,
        slot_rank=config.slot_rank and config.slot_rank * first.terms,
    )
    for tensor in bank.tensors.values():
        mark_fixed_shape(tensor)
    return Group(tuple(siblings), (0, *accumulate(sizes[:-1])), bank)


def _mark(site: Site, index: int, group: Group, runtime: Runtime) -> SiteMark:
    siblings, offsets, sizes = group.ranges(index)
    mark = SiteMark(
        path=site.path,
        runtime=runtime,
        bank=group.bank,
        siblings=tuple(siblings),
        offsets=tuple(offsets),
        sizes=tuple(sizes),
        kind=site.eligible.kind,
        in_features=site.in_features,
        out_features=site.out_features,
        weight_name=site.eligible.weight,
        transposed=site.eligible.transposed,
        derived=site.has_own_forward,
        handler=site.eligible.handler,
        stored=is_stored(site.module, site.eligible),
        made=bool(maker_of(site.module, site.eligible.weight)),
        window=window_of(site.module) if site.eligible.kind == "conv" else None,
    )
    known = site.eligible.cls is nn.Linear and not (mark.derived or mark.handler or mark.stored)
    mark.of_linear = known and mark.is_plain and not mark.made
    return mark


def _one_device(sites: Sequence[Site]) -> torch.device:
    devices = list(dict.fromkeys(site.device for site in sites))
    if len(devices) > 1:
        raise ConfigError(
            f"the sites lie on {', '.join(map(str, devices))}; lorafx serves models on one device"
        )
    return devices[0] if devices else torch.device("cpu")


def _refuse_marked(graph: ModuleGraph) -> None:
    """Raise CaptureError for marks of this model, a part of it, or one that contains it; a model
    that only shares some modules may have marks on them."""
    for path, module in graph.modules():
        for hook in marks_on(module):
            session, marked = hook.runtime.session, f"{path or 'the model'} already carries"
            if session is None or graph.has(session.program.model):
                raise CaptureError(
                    f"{marked} a LoRA mark; detach the model before attaching again: "
                    "lorafx.detach(model)"
                )
            other = type(session.program.model).__name__
            if session.program.graph.has(graph.root):
                raise CaptureError(
                    f"{marked} a LoRA mark: it is part of a {other} that carries LoRA; detach that "
                    "model first"
                )


def _refuse_compiled(graph: ModuleGraph, sites: Sequence[Site]) -> None:
    """Raise CaptureError for a compiled forward around a site: Dynamo does not guard hooks, so it
    would run without deltas."""
    above = graph.ancestors(site.module for site in sites)
    for path, module in graph.modules():
        if id(module) not in above:
            continue
        label = f"{path or 'the model'} ({type(module).__qualname__})"
        if module._compiled_call_impl is not None:
            raise CaptureError(
                f"{label} was compiled by module.compile(); its graphs would not see LoRA. "
                "Give lorafx the model before compiling it"
            )
        disabled = getattr(module.forward, "_torchdynamo_disable", False)  # Dynamo skips it
        if hasattr(module.forward, "_torchdynamo_orig_callable") and not disabled:
            raise CaptureError(
                f"the forward of {label} was compiled by torch.compile; its graphs would not see "
                "LoRA. Give lorafx the model before compiling it"
            )
