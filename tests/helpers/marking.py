"""Marks on given sites of a model, by the pass that production code uses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorafx.config import LoraConfig
from lorafx.model.attachment import Attachment
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.sites import Site
from lorafx.passes.attach import Attach
from lorafx.program.preparation import Preparation


def attach_sites(model: nn.Module, sites: Sequence[Site], config: LoraConfig) -> Attachment:
    prepared = Preparation(model, config, sites=tuple(sites))
    prepared.graph = ModuleGraph.of(model)
    Attach().run(prepared)
    assert prepared.attachment is not None
    return prepared.attachment
