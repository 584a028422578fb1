"""Time and memory of pushing all weights of a served model, beside a plain `load_state_dict`.

    over   = median seconds of cm.load_weights / median seconds of model.load_state_dict
    extra  = peak resident memory while it runs, less what was resident before

Models have a billion parameters in bfloat16: "dense" is a Llama, "moe" a Qwen3-MoE whose experts
are pushed one by one. Sources: a mapping; a function that hands out one buffer (what it adds to
memory is that buffer, of the largest tensor's size); a generator, whose update keeps what the
weights were, in memory or on disk. Both ways write the same numbers into the same model, in turns,
so that other work on the machine meets both. Threads are torch's default.

    python benchmarks/weight_update.py [--scale 1.0] [--attempts 5] [--out results.json]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from protocol import save
from torch import Tensor, nn

import lorafx

MIB = 2**20


def dense(scale: float) -> nn.Module:
    """1.0e9 parameters at scale 1, by the number of layers."""
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=max(1, round(14 * scale)),
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=64_000,
    )
    return transformers.LlamaForCausalLM(config)


def moe(scale: float) -> nn.Module:
    """1.0e9 parameters at scale 1, 64 experts a layer."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=384,
        num_experts=64,
        num_experts_per_tok=8,
        num_hidden_layers=max(1, round(12 * scale)),
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32_000,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def of_trainer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a wrapped model, and a tensor for each expert and projection."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, last = name.rpartition(".")
        if tensor.dim() != 3:
            found[f"base_model.model.{name}"] = tensor
            continue
        names = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        for expert, both in enumerate(tensor):
            for projection, part in zip(names, both.chunk(len(names)), strict=True):
                found[f"base_model.model.{module}.{expert}.{projection}.weight"] = part
    return found


def in_one_buffer(state: dict[str, Tensor]) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """A function whose tensors all come in one buffer."""

    def pairs() -> Iterator[tuple[str, Tensor]]:
        buffer = torch.empty(max(tensor.numel() for tensor in state.values()), dtype=torch.bfloat16)
        for name, tensor in state.items():
            yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)

    return pairs


def filled_one_by_one(state: dict[str, Tensor], model: nn.Module) -> None:
    """What a trainer that hands out one buffer costs without lorafx."""
    own = model.state_dict()
    for _ in in_one_buffer(state)():  # lorafx goes through it once before it writes
        pass
    for name, tensor in in_one_buffer(state)():
        own[name].copy_(tensor)


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, extra peak MiB) of one call."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    start = time.perf_counter()
    work()
    return time.perf_counter() - start, (_resident("VmHWM") - before) / MIB


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def examine(kind: str, model: nn.Module, attempts: int) -> list[dict[str, object]]:
    """A row for every source of one model, each in turns with `load_state_dict`."""
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    new = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    largest = max(tensor.nbytes for tensor in new.values()) / MIB
    names = of_trainer(new)
    linears = lorafx.LoraConfig(target_modules="all-linear", max_adapters=2, max_rank=8)
    cm = lorafx.compile(model, linears, options={"lowering": "reference"})
    ways: dict[str, Callable[[], object]] = {
        "load_state_dict": lambda: model.load_state_dict(new),
        "mapping": lambda: cm.load_weights(new),
        "mapping, trainer's names": lambda: cm.load_weights(names),
        "load_state_dict by one buffer": lambda: filled_one_by_one(new, model),
        "function, one buffer": lambda: cm.load_weights(in_one_buffer(new)),
        "generator": lambda: cm.load_weights(iter(names.items())),
    }
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for attempt in range(attempts + 1):
        for way, work in ways.items():
            for tensor in model.state_dict().values():
                tensor.zero_()
            result = measured(work)
            if attempt:  # the first touches pages
                found[way].append(result)
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, new[name]), (way, name)
    cm.detach()
    by_trainer = ("mapping, trainer's names", "generator")
    beside = {"function, one buffer": "load_state_dict by one buffer"}
    model_row: dict[str, object] = {
        "model": kind,
        "parameters": sum(tensor.numel() for tensor in new.values()),
        "weights_mib": round(sum(tensor.nbytes for tensor in new.values()) / MIB, 1),
        "largest_mib": round(largest, 1),
    }
    rows = []
    for way, results in found.items():
        reference = statistics.median(s for s, _ in found[beside.get(way, "load_state_dict")])
        seconds = [s for s, _ in results]
        row: dict[str, object] = {
            "way": way,
            "tensors": len(names if way in by_trainer else new),
            "median_s": round(statistics.median(seconds), 4),
            "best_s": round(min(seconds), 4),
            "over": round(statistics.median(seconds) / reference, 3),
            "extra_mib": round(max(extra for _, extra in results), 1),
        }
        print(kind, *(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
        rows.append({**model_row, **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of layers")
    parser.add_argument("--attempts", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for kind, build in (("dense", dense), ("moe", moe)):
        rows += examine(kind, build(arguments.scale), arguments.attempts)
        gc.collect()
    if arguments.out:
        save(arguments.out, "All weights of a served model, beside load_state_dict", rows)


if __name__ == "__main__":
    main()
