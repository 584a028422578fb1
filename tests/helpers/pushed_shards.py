"""Weights pushed into the example Llama on each rank; see `two_ranks`."""

from __future__ import annotations

import torch
from tensor_parallel import example, llama_config
from torch import Tensor

import lorafx
from lorafx.layers import Int8ChannelLinearMethod, load_weights


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
