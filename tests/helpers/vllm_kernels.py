"""vLLM's Triton kernels of LoRA and lorafx's on the same tensors, in Triton's interpreter.

    python vllm_kernels.py FOLDER      FOLDER has the package vllm; TRITON_INTERPRET=1 is set

Prints the largest difference of each case, relative to the largest value, as JSON. lorafx's side is
what a layer calls, a site whose factors vLLM's layer holds as views of its bank; adapters have
unequal ranks, padded with zeros, and some rows are of the base.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import vllm_ops

from lorafx.integrations.vllm import sites
from lorafx.integrations.vllm.wrapper import LoraWrapper

SLOTS, RANK, K = 4, 8, 48
DTYPE = torch.float16
RANKS = (8, 3, 0, 5)


def fill(stacks: Sequence[Tensor], axis: int) -> None:
    """Random factors; those beyond a slot's rank, along `axis`, are zeros."""
    for stack in stacks:
        stack.copy_(torch.randn(stack.shape) * 0.3)
        for slot, rank in enumerate(RANKS):
            stack[slot].narrow(axis, rank, RANK - rank).zero_()


def slots_of(rows: int) -> Tensor:
    return torch.arange(rows, dtype=torch.int32) * 3 % (SLOTS + 1) - 1


def wrapper_for(slots: Tensor) -> LoraWrapper:
    wrapper = LoraWrapper(len(slots) + 5, 4, "cpu")
    wrapper.tokens.write(slots.tolist())
    return wrapper


def metadata(modules: dict[str, Any], slots: Tensor) -> Any:
    meta = modules["lora_kernel_metadata.py"].LoRAKernelMeta.make(SLOTS, len(slots), device="cpu")
    meta.prepare_tensors(slots)
    return meta.meta_args(len(slots), False)


def difference(got: Tensor, want: Tensor, base: Tensor) -> float:
    assert not torch.equal(want, base)
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def linear(modules: dict[str, Any], rows: int, sizes: Sequence[int]) -> float:
    slots, x = slots_of(rows), torch.randn(rows, K).to(DTYPE)
    layer = SimpleNamespace(
        lora_a_stacked=tuple(torch.zeros(SLOTS, 1, RANK, K, dtype=DTYPE) for _ in sizes),
        lora_b_stacked=tuple(torch.zeros(SLOTS, 1, n, RANK, dtype=DTYPE) for n in sizes),
        base_layer=SimpleNamespace(params_dtype=DTYPE),
    )
    site = sites.LinearSite(wrapper_for(slots), layer)
    fill(layer.lora_a_stacked, 1)
    fill(layer.lora_b_stacked, 2)
    for slot in range(SLOTS):
        site.read_ranks(slot)
    base = torch.randn(rows, sum(sizes)).to(DTYPE)
    got, want = base.clone(), base.clone()
    site.add_lora_linear(got, x, None, None, 1.0, sizes)
    arguments = metadata(modules, slots)
    v = torch.empty((len(sizes), rows, RANK), dtype=torch.float32)
    a = [each.contiguous() for each in layer.lora_a_stacked]
    b = [each.contiguous() for each in layer.lora_b_stacked]
    modules["lora_shrink_op.py"].lora_shrink(x, a, v, *arguments, 1.0)
    modules["lora_expand_op.py"].lora_expand(
        v, b, want, *arguments, offset_start=0, add_inputs=True
    )
    return difference(got, want, base)


def experts(modules: dict[str, Any], rows: int, count: int, k: int, inner: int) -> list[float]:
    """Of both products of routed experts."""
    slots, x = slots_of(rows), torch.randn(rows, K).to(DTYPE)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(SLOTS, count, *shape, dtype=DTYPE)

    layer = SimpleNamespace(
        w13_lora_a_stacked=(zeros(RANK, K), zeros(RANK, K)),
        w13_lora_b_stacked=(zeros(inner, RANK), zeros(inner, RANK)),
        w2_lora_a_stacked=(zeros(RANK, inner),),
        w2_lora_b_stacked=(zeros(K, RANK),),
        enable_moe_shared_loras=False,
        fully_sharded=False,
        tp_rank=0,
        local_num_experts=count,
        moe_config=SimpleNamespace(in_dtype=DTYPE),
    )
    site = sites.ExpertsSite(wrapper_for(slots), layer)
    for name in ("w13", "w2"):
        fill(getattr(layer, f"{name}_lora_a_stacked"), 1)
        fill(getattr(layer, f"{name}_lora_b_stacked"), 2)
    for slot in range(SLOTS):
        site.read_ranks(slot)
    ids = torch.stack([torch.randperm(count)[:k] for _ in range(rows)])
    weights = torch.rand(rows, k)
    arguments = metadata(modules, slots)
    up, down = torch.randn(rows, k, 2 * inner).to(DTYPE), torch.randn(rows, k, K).to(DTYPE)
    act = torch.randn(rows * k, inner).to(DTYPE)
    got = [up.clone(), down.clone()]
    routing = site.add_lora_w13(got[0], x, None, None, ids, weights, None)
    site.add_lora_w2(got[1], act, None, None, weights, *routing)
    want = [up.clone(), down.clone()]
    for y, rows_of_x, name, weighted in ((want[0], x, "w13", False), (want[1], act, "w2", True)):
        modules[vllm_ops.EXPERTS]._run_fused_moe_lora_small_batch(
            *(y, rows_of_x),
            *([t.contiguous() for t in getattr(layer, f"{name}_lora_{c}_stacked")] for c in "ab"),
            *(weights, ids.flatten().to(torch.int32), arguments[0], k),
            *(torch.ones(SLOTS + 1, dtype=torch.int32), weighted),
        )
    return [difference(*each) for each in zip(got, want, (up, down), strict=True)]


def main(folder: Path) -> None:
    modules = vllm_ops.load(folder, (*vllm_ops.FILES, vllm_ops.EXPERTS))
    torch.manual_seed(0)
    sites.COMPILED_ON.clear()  # Triton's kernels on a CPU, too, where its interpreter runs them
    found: dict[str, float] = {}
    for rows in (3, 40):
        for sizes in ((64,), (64, 32, 32)):
            found[f"{rows} rows, {len(sizes)} slices"] = linear(modules, rows, sizes)
    for name, value in zip(("w13", "w2"), experts(modules, 5, 4, 2, 32), strict=True):
        found[name] = value
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
