"""Marking a model: sites, adapters, banks, marks and packed weights, or the model as it was."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorafx.adapter_store.checkpoint import AdapterState
from lorafx.adapter_store.peft_model import TakenOver, is_peft_model, peft_layers, take_over
from lorafx.adapter_store.peft_reader import Adapter, read_adapter
from lorafx.adapter_store.store import AdapterStore
from lorafx.capture.lowering import resolved
from lorafx.capture.pipeline import check_options
from lorafx.collector import collection_paused
from lorafx.config import LoraConfig, Options
from lorafx.errors import ConfigError, LorafxWarning, nearest
from lorafx.model.packing import pack_weights
from lorafx.model.sites import Site
from lorafx.passes.attach import Attach, Attachment
from lorafx.passes.select import build_sites
from lorafx.prepare.configuration import request_of
from lorafx.program.program import Program
from lorafx.progress import progress


@dataclass(frozen=True)
class Marked:
    """A marked model.

    Attributes:
        taken: what PEFT had put into the model, where it had.
    """

    program: Program
    attachment: Attachment
    store: AdapterStore
    taken: TakenOver | None


def mark(
    model: nn.Module, lora_config: Any, adapters: Mapping[str, Any] | None, options: Any
) -> Marked:
    """Mark `model`; the arguments are those of `lorafx.compile`, and so are the errors, after which
    the model is as it was."""
    settings = Options.of(options)
    check_options(settings)
    sources: dict[str, Any] = dict(adapters or {})
    taken = None
    if is_peft_model(model) or peft_layers(model):
        taken = take_over(model)
        model = taken.base
        sources = {**taken.adapters, **sources}
    try:
        with collection_paused():
            request = request_of(lora_config, sources, model)
            marked = _mark(model, request.config, settings, request.adapters, taken)
    except BaseException:
        if taken is not None:
            taken.restore()
        raise
    if taken is not None:
        marked.attachment.on_detach.append(taken.restore)
    return marked


def _mark(
    model: nn.Module,
    config: LoraConfig,
    options: Options,
    adapters: dict[str, AdapterState],
    taken: TakenOver | None,
) -> Marked:
    if model.training:
        warnings.warn(
            f"{type(model).__name__} is in training mode, so its dropout is active; call eval() "
            "for inference",
            LorafxWarning,
            stacklevel=4,
        )
    graph, sites = build_sites(model, config)
    _check_plan(options, sites)
    options = resolved(options, sites[0].device)
    loaded: list[Adapter] = []
    for name in list(adapters):
        with progress(f"reading adapter {name}"):
            adapter = read_adapter(
                adapters.pop(name),  # what was saved is not kept beside what was read
                name,
                sites,
                model=model,
                max_rank=config.max_rank,
                lora_config=config,
                strict=options.strict,
            )
            loaded.append(adapter)
    attachment = Attach().run(graph, sites, config)
    try:
        store = AdapterStore(attachment.groups, config.max_adapters, config.max_rank)
        for adapter in loaded:
            store.load(adapter)
    except BaseException:
        attachment.detach()
        raise
    packed = []
    # Only the `pack` pass reads packed weights, and what it merges is what `fuse` made.
    if options.passes.get("pack", True) and options.passes.get("fuse", True):
        alone = graph.alone()
        for group in attachment.groups:
            pack = pack_weights(graph, group, alone)
            if pack is not None:
                packed.append(pack)
                for site in group.sites:
                    mark = attachment.marks[site.path]
                    mark.weight, mark.bias = pack.weight, pack.bias
    program = Program(
        model, graph, sites, attachment.groups, tuple(packed), attachment.runtime, config, options
    )
    return Marked(program, attachment, store, taken)


def _check_plan(options: Options, sites: Sequence[Site]) -> None:
    paths = [site.path for site in sites]
    for path in options.plan:
        if path not in paths:
            raise ConfigError(
                f"Options.plan names {path!r}, which is no site{nearest(path, paths)}"
            )
