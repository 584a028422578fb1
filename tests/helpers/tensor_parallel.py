"""The example Llama cut among ranks, and what a rank does with it; see `two_ranks`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

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
) -> list[Tensor]:
    """Logits of the example Llama, cut among the ranks, with adapters; last in eager mode."""
    quant = Int8ChannelLinearMethod() if quantised else None
    model = example("parallel_llama").ParallelLlama(llama_config(**changes), quant).eval()
    load_weights(model, state)
    compiled = lorafx.compile(model, folders, options=options)
    found = [compiled(ids, adapter_names=names) for ids, names in batches]
    compiled.detach()

    ids, names = batches[0]
    lorafx.attach(model, folders)
    for name in dict.fromkeys(names):
        rows = torch.tensor([i for i, other in enumerate(names) if other == name])
        with lorafx.adapters(model, [name] * len(rows)):
            found.append(model(ids[rows]))
    return found


@torch.no_grad()
def push_weights(
    rank: int, size: int, old: dict[str, Tensor], new: dict[str, Tensor], quantised: bool
) -> bool:
    """Whether a compiled rank that is given `new` has what one that starts with it has."""
    quant = Int8ChannelLinearMethod() if quantised else None
    model, like = (
        example("parallel_llama").ParallelLlama(llama_config(), quant).eval() for _ in range(2)
    )
    load_weights(model, old)
    load_weights(like, new)
    cm = lorafx.compile(model, lorafx.LoraConfig(), options={"lowering": "reference"})
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    cm.load_weights((f"base_model.model.{name}", tensor) for name, tensor in new.items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    wanted = like.state_dict()
    return all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def run_merged(
    rank: int, size: int, state: dict[str, Tensor], folders: dict[str, Path], ids: Tensor
) -> tuple[dict[str, Tensor], str]:
    """Logits of the example Llama with each adapter merged, and what an export says."""
    model = example("parallel_llama").ParallelLlama(llama_config(), None).eval()
    load_weights(model, state)
    compiled = lorafx.compile(model, folders, options={"lowering": "reference"})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = {}
    for name in folders:
        compiled.merge(name)
        found[name] = model(ids)
        compiled.unmerge()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    try:
        compiled.export_merged(name, folders[name])
    except lorafx.MatchError as error:
        return found, str(error)
    return found, ""
