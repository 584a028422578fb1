"""The example Llama cut among ranks, and what a rank does with it; see `two_ranks`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lorafx
from lorafx.layers import Int8ChannelLinearMethod, load_weights

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    """The module of an example script."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama_config(**changes: Any) -> transformers.LlamaConfig:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return transformers.LlamaConfig(**{**sizes, **changes})


@torch.no_grad()
def run_llama(
    rank: int,
    size: int,
    changes: dict[str, Any],
    state: dict[str, Tensor],
    folders: dict[str, Path],
    batches: Sequence[tuple[Tensor, list[str | None]]],
    options: dict[str, Any],
    quantised: bool,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits of the example Llama, cut among the ranks, with adapters; last in eager mode. And
    those of the first batch with each adapter merged, where nothing is quantised."""
    quant = Int8ChannelLinearMethod() if quantised else None
    model = example("parallel_llama").ParallelLlama(llama_config(**changes), quant).eval()
    load_weights(model, state)
    compiled = lorafx.compile(model, folders, options=options)
    found = [compiled(ids, adapter_names=names) for ids, names in batches]
    ids, names = batches[0]
    merged = {} if quantised else {name: run_merged(compiled, name, ids) for name in folders}
    compiled.detach()

    lorafx.attach(model, folders)
    for name in dict.fromkeys(names):
        rows = torch.tensor([i for i, other in enumerate(names) if other == name])
        with lorafx.adapters(model, [name] * len(rows)):
            found.append(model(ids[rows]))
    return found, merged


def run_merged(compiled: lorafx.CompiledModel, name: str, ids: Tensor) -> Tensor:
    """Logits with this rank's share of the adapter in its weights, which are put back."""
    before = {key: value.clone() for key, value in compiled.model.state_dict().items()}
    compiled.merge(name)
    logits = compiled(ids)
    compiled.unmerge()
    after = compiled.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with pytest.raises(
        lorafx.MatchError, match="only a share of its weight; export on a single rank"
    ):
        compiled.export_merged(name, "never written")
    return logits
