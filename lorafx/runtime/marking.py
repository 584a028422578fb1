"""Marking a model: sites, adapters, banks, marks and packed weights. On failure the model is
restored."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorafx.adapter_store.peft_model import (
    TakenOver,
    is_peft_model,
    peft_layers,
    take_over,
    without_wrappers,
)
from lorafx.adapter_store.peft_reader import adapter_target_modules
from lorafx.adapter_store.store import AdapterStore
from lorafx.capture.lowering import resolved
from lorafx.config import LoraConfig, Options
from lorafx.interrupts import Rollback
from lorafx.model.marks import Attachment
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.sites import Site
from lorafx.model.training import warn_training
from lorafx.pass_order import pipeline, run_model_passes
from lorafx.passes.select import Alias, Select
from lorafx.program.argument_roles import check_names
from lorafx.program.preparation import Preparation
from lorafx.program.program import Program
from lorafx.runtime.configuration import Request, by_name, request_of


@dataclass(frozen=True)
class Marked:
    """A marked model, and what PEFT had put into it (`taken`)."""

    program: Program
    attachment: Attachment
    store: AdapterStore
    taken: TakenOver | None


def mark(
    model: nn.Module,
    lora_config: Any,
    adapters: Mapping[str, Any] | Sequence[Any] | None,
    options: Any,
) -> Marked:
    """Mark `model`; the arguments are those of `lorafx.compile`, and so are the errors, after which
    the model is as it was."""
    settings = Options.of(options)
    pipeline(settings)  # its names are right
    sources = by_name(adapters)
    model = without_wrappers(model)
    taken, rollback = None, Rollback()
    try:
        if is_peft_model(model) or peft_layers(model):
            taken = take_over(model)
            rollback.add(taken.restore)
            model = taken.base
            sources = {**taken.adapters, **sources}
        with _collection_paused():
            request = request_of(lora_config, sources, model)
            if taken is not None and len(taken.active) > 1 and lora_config is None:
                # Banks have room for the sum of the adapters that were active at once.
                active = [request.adapters[name] for name in taken.active]
                rank = sum(adapter_target_modules(state, model).rank for state in active)
                rank = max(request.config.max_rank, rank)
                request = replace(request, config=replace(request.config, max_rank=rank))
            return _mark(model, request, settings, taken, rollback)
    except BaseException:
        rollback.run()
        raise


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Inside, Python does not look for garbage: walking over the million objects of a model of
    10,000 modules, all of which last, took 1.2 s of 2.0."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def build_sites(model: nn.Module, config: LoraConfig) -> tuple[ModuleGraph, tuple[Site, ...]]:
    """The module graph of `model` and the sites that `config` asks for; nothing is changed.

    Raises:
        CaptureError: the model is, or holds, a wrapper made by torch.compile.
        TargetError: targets that name nothing or cannot carry LoRA, all in one error.
        ConfigError: a target specification of another form.
    """
    with _collection_paused():
        found = Preparation(model, config)
        run_model_passes(found, (Alias(), Select()))
    return found.graph, found.sites


def _mark(
    model: nn.Module,
    request: Request,
    options: Options,
    taken: TakenOver | None,
    rollback: Rollback,
) -> Marked:
    check_names(request.config.row_dims, model)
    if model.training:
        warn_training(model, stacklevel=4)
    prepared = Preparation(
        model, request.config, options, request.adapters, request.origins, rollback=rollback
    )
    reports = run_model_passes(prepared)
    attachment, store = prepared.attachment, prepared.store
    assert attachment is not None
    assert store is not None
    program = Program(
        model,
        prepared.graph,
        prepared.sites,
        attachment.groups,
        prepared.packed,
        attachment.runtime,
        request.config,
        resolved(options, prepared.sites[0].device),
        tuple(reports),
    )
    return Marked(program, attachment, store, taken)
