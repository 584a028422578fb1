"""Layers and the example Llama cut among ranks, and what a rank does with them; see `two_ranks`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from tiny_models import ONE_LAYER, VOCAB
from torch import Tensor
from torch.testing import assert_close

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


#: One of each kind of collective; capturing all would only take time.
CAPTURED = ("merged", "row", "head")


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
    """Outputs of all layers, loaded from whole weights, and their sizes."""
    found: dict[str, Any] = {}
    for name, layer in layers().items():
        load_weights(layer, state[name])
        quantised = layers(quant_method=Int8ChannelLinearMethod())[name]
        load_weights(quantised, state[name])
        found[name] = (layer(x), quantised(x), layer.output_partition_sizes)
        if name in CAPTURED:
            captured = torch.compile(layer, backend="aot_eager", fullgraph=True)
            assert_close(captured(x), found[name][0], rtol=0, atol=1e-5)
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
    lambda: scaled_in_int8(),
)


class Scaled(RowParallelLinear):
    """A forward of its own, around the sum over the ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def scaled_in_int8() -> torch.nn.Module:
    """Only the layer's whole call is known to multiply by a weight in a format, and what it
    returns is the ranks' sum already."""
    model = torch.nn.Sequential(Scaled(6, 4, quant_method=Int8ChannelLinearMethod())).eval()
    return lorafx.attach(model, lorafx.LoraConfig(target_modules=["0"]))


def _refusal(make: Callable[[], torch.nn.Module]) -> str:
    try:
        make()
    except lorafx.ConfigError as error:
        return str(error)
    return "built"


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
    return transformers.LlamaConfig(**{"vocab_size": VOCAB, **ONE_LAYER, **changes})


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
    before = {key: value.clone() for key, value in compiled._orig_mod.state_dict().items()}
    compiled.merge(name)
    logits = compiled(ids)
    compiled.unmerge()
    after = compiled._orig_mod.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with pytest.raises(
        lorafx.MatchError, match="only a share of its weight; export on a single rank"
    ):
        compiled.export_merged(name, "never written")
    return logits
