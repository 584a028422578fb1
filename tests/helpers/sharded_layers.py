"""The layers that every rank builds in the tests of tensor parallelism; see `two_ranks`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
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
