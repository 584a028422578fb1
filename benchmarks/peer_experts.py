"""vLLM's fused op for LoRA on routed experts, as peers.py loads it. None of its code is here.

The op adds deltas to y in place; a program takes a block of choices of one expert and adapter. Its
rows are choices in the order of tokens: choice j of token t is row t·top + j. Which choices make a
block is computed by a C op of vLLM in every step; here `aligned` does it once, ahead of the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import peers
import torch
from torch import Tensor

FILES = ("fused_moe_lora_op.py", "lora_kernel_metadata.py")
#: Choices in a block. vLLM 0.33.0 takes 16 for 64 tokens and 128 for 8192 where an H200 was tuned
#: for these experts, 32 and 128 where no table is at hand.
BLOCKS = (16, 32, 64, 128)
NOTES = (
    "not timed: alignment of choices into blocks (a C op of vLLM in every step, plain torch here), "
    "and moving rows between the base product's order by expert and vLLM's order by token"
)


@dataclass(frozen=True)
class Layer:
    """Adapters of one product and who asks for what.

    Attributes:
        experts: (T, top), chosen by each token; slots: (T,) int32, the adapter of each, none −1.
        A: (S, E, r, K) a sibling; B: (S, E, N, r) a sibling, scales multiplied in. All siblings
            have the same N.
        by_choice: x has a row for each choice, else one for each token. vLLM multiplies the first
            kind by the router's weights, which are 1 here.
    """

    experts: Tensor
    slots: Tensor
    A: Sequence[Tensor]
    B: Sequence[Tensor]
    by_choice: bool


#: add(x, y): deltas of x (T or T·top, K) into y (T·top, ΣN).
Add = Callable[[Tensor, Tensor], None]
Make = Callable[[Layer, int], Add]


def find() -> Make | str:
    """What makes `Add` for a layer and a block size, or why there is none."""
    modules = peers.load("vllm", peers.at_hand("vllm"), FILES)
    return modules if isinstance(modules, str) else _maker(modules)


def aligned(layer: Layer, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices by adapter and expert, each expert's filled up to whole blocks.

    Returns:
        int32: choices (S, L), T·top where there is none; the expert of each block (S, ⌈L / block⌉),
        none −1; how many choices of each adapter count, those filled in too (S,). L is as in vLLM,
        which has to allow for any routing.
    """
    S, E = layer.A[0].shape[:2]
    count, top = layer.experts.numel(), layer.experts.shape[1]
    length = count * block if count < E else count + E * (block - 1)
    choices = torch.full((S, length), count, dtype=torch.int32)
    owners = torch.full((S, -(-length // block)), -1, dtype=torch.int32)
    used = torch.zeros(S, dtype=torch.int32)
    experts, slots = layer.experts.flatten().cpu(), layer.slots.cpu().repeat_interleave(top)
    for slot in range(S):
        for expert in range(E):
            mine = ((slots == slot) & (experts == expert)).nonzero().flatten()
            start, blocks = int(used[slot]), -(-len(mine) // block)
            choices[slot, start : start + len(mine)] = mine.to(torch.int32)
            owners[slot, start // block : start // block + blocks] = expert
            used[slot] += blocks * block
    device = layer.experts.device
    return choices.to(device), owners.to(device), used.to(device)


def _maker(modules: Mapping[str, ModuleType]) -> Make:
    op, metadata = (modules[file] for file in FILES)

    def make(layer: Layer, block: int) -> Add:
        T, top = layer.experts.shape
        S, _, rank = layer.A[0].shape[:3]
        device = layer.experts.device
        meta = metadata.LoRAKernelMeta.make(S, T, device=device)
        meta.prepare_tensors(layer.slots)
        mapping, *_, active, _, how_many = meta.meta_args(T, True)
        weights = torch.ones((T, top), device=device)
        enabled = torch.ones(S + 1, dtype=torch.int32, device=device)
        blocks = aligned(layer, block)
        A, B = list(layer.A), list(layer.B)
        # Tiles beside the blocks; at this rank the op chooses its own.
        tiles = (block, 64, 32, 8, 4, 3, 1)

        def add(x: Tensor, y: Tensor) -> None:
            y = y.view(T, top, -1)
            ids = (*blocks, mapping, rank, top, active, how_many, enabled)
            op.fused_moe_lora(y, x, A, B, weights, *ids, *tiles, *tiles, layer.by_choice)

        return add

    return make
