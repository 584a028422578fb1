"""Marks on a model, without a session: by the pass that production code uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn

from lorafx.config import LoraConfig
from lorafx.model.attachment import Attachment
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.sites import Site
from lorafx.passes.attach import Attach
from lorafx.program.program import Preparation
from lorafx.runtime.marking import build_sites

#: A call of `llama()`, and a pattern for all that it has.
IDS = {"input_ids": torch.arange(14).view(2, 7)}
ALL = r".*(_proj|embed_tokens|lm_head)"


def llama(**changes: Any) -> nn.Module:
    """A Llama of two layers; the same weights each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        **changes,
    )
    return transformers.LlamaForCausalLM(config).eval()


def attach_sites(model: nn.Module, sites: Sequence[Site], config: LoraConfig) -> Attachment:
    """Mark these sites of `model`."""
    prepared = Preparation(model, config, sites=tuple(sites))
    prepared.graph = ModuleGraph(model)
    Attach().run(prepared)
    assert prepared.attachment is not None
    return prepared.attachment


def attach(model: nn.Module, target: Any = None, **config: Any) -> Attachment:
    """Mark what `target` names, with banks of 3 slots and rank 4."""
    lora = LoraConfig(target_modules=target, max_adapters=3, max_rank=4, **config)
    _, sites = build_sites(model, lora)
    return attach_sites(model, sites, lora)
