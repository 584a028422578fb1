"""What the ranks do in the tests of tensor parallelism; see `two_ranks`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

import lorafx
from lorafx.layers import (
    ColumnParallelLinear,
    FusedMoE,
    Int8ChannelLinearMethod,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    load_weights,
)

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


def layers(**options: Any) -> dict[str, torch.nn.Module]:
    """One of each layer, sizes that tell them apart; outputs are whole on every rank."""
    whole = {"gather_output": True, **options}
    return {
        "column": ColumnParallelLinear(6, 8, **whole),
        "merged": MergedColumnParallelLinear(6, [4, 10, 2], **whole),
        "qkv": QKVParallelLinear(6, 3, 4, 2, **whole),
        "one_kv_head": QKVParallelLinear(6, 3, 4, 1, v_head_size=5, **whole),
        "row": RowParallelLinear(6, 7, input_is_parallel=False, **options),
        "head": ParallelLMHead(11, 6, bias=True, **options),
    }


def embedding_and_experts() -> dict[str, torch.nn.Module]:
    return {"embedding": VocabParallelEmbedding(11, 6), "experts": FusedMoE(4, 2, 6, 8)}


@torch.no_grad()
def run_layers(rank: int, size: int, state: dict[str, dict[str, Tensor]], x: Tensor) -> Any:
    """Outputs of all layers, loaded from whole weights, eagerly and captured; and their sizes."""
    found: dict[str, Any] = {}
    for name, layer in layers().items():
        load_weights(layer, state[name])
        captured = torch.compile(layer, backend="aot_eager", fullgraph=True)
        quantised = layers(quant_method=Int8ChannelLinearMethod())[name]
        load_weights(quantised, state[name])
        found[name] = (layer(x), captured(x), quantised(x), layer.output_partition_sizes)
        assert (layer.tp_rank, layer.tp_size) == (rank, size)
    more = embedding_and_experts()
    for name, layer in more.items():
        load_weights(layer, state[name])
    found["embedding"] = more["embedding"](torch.arange(11))
    found["experts"] = more["experts"](x, x[..., :4])
    found["refused"] = [_refusal(make) for make in REFUSED]
    group = dist.group.WORLD
    found["sizes"] = [
        RowParallelLinear(6, 5, tp_group=group).tp_size,
        RowParallelLinear(5, 6, disable_tp=True).tp_size,
    ]
    return found


#: Sizes that two ranks cannot divide.
REFUSED: Sequence[Callable[[], torch.nn.Module]] = (
    lambda: ColumnParallelLinear(6, 5),
    lambda: RowParallelLinear(5, 6, prefix="o_proj"),
    lambda: MergedColumnParallelLinear(6, [4, 3]),
    lambda: QKVParallelLinear(6, 2, 3),
    lambda: QKVParallelLinear(6, 2, 6, 3),
    lambda: VocabParallelEmbedding(1, 4),
    lambda: FusedMoE(4, 2, 6, 7),
)


def _refusal(make: Callable[[], torch.nn.Module]) -> str:
    try:
        make()
    except lorafx.ConfigError as error:
        return str(error)
    return "built"


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
