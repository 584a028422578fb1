"""Marks on a model, without a session: by the pass that production code uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lorafx.config import LoraConfig
from lorafx.model.attachment import Attachment
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.sites import Site
from lorafx.passes.attach import Attach
from lorafx.prepare.marking import build_sites
from lorafx.program.preparation import Preparation


def attach_sites(model: nn.Module, sites: Sequence[Site], config: LoraConfig) -> Attachment:
    """Mark these sites of `model`."""
    prepared = Preparation(model, config, sites=tuple(sites))
    prepared.graph = ModuleGraph.of(model)
    Attach().run(prepared)
    assert prepared.attachment is not None
    return prepared.attachment


def attach(model: nn.Module, target: Any = None, **config: Any) -> Attachment:
    """Mark what `target` names, with banks of 3 slots and rank 4."""
    lora = LoraConfig(target_modules=target, max_adapters=3, max_rank=4, **config)
    _, sites = build_sites(model, lora)
    return attach_sites(model, sites, lora)
