"""What slots that share room cost in a decode step, and what they save of memory.

A Llama of hidden 512 and 4 layers, 64 adapters of rank 8 and one of rank 256 on all its linears.

    plain     banks of 65 slots of rank 8, which the largest adapter does not fit
    shared    LoraConfig(max_adapters=65, max_rank=256, slot_rank=8)

    A step is one token for each of 8 requests, with 8 adapters of rank 8 ("equal"), or with the
    largest for one of them ("one large", of "shared" alone).

    memory    bytes of the banks' factors over those of the adapters' own ranks

    python benchmarks/slot_rank.py [--blocks 20] [--out results.json]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from adapter_store import TARGETS, Sizes, build_model
from protocol import as_row, compare, save, save_adapter
from transformers import LlamaForCausalLM

import lorafx

SMALL, LARGE, COUNT, REQUESTS = 8, 256, 64, 8
#: The most that a step may cost over one with plain banks, and the banks over the adapters' ranks.
STEP_GOAL, MEMORY_GOAL = 1.0, 1.2


def save_adapters(model: LlamaForCausalLM, folder: Path) -> dict[str, str]:
    """Adapters of rank SMALL and one of rank LARGE."""
    ranks = {**{f"a{index}": SMALL for index in range(REQUESTS)}, "large": LARGE}
    return {
        name: save_adapter(model, folder / name, rank, TARGETS, std=0.02)
        for name, rank in ranks.items()
    }


def serve(model: LlamaForCausalLM, paths: dict[str, str], **room: Any) -> Any:
    config = lorafx.LoraConfig(target_modules=TARGETS, max_adapters=COUNT + 1, **room)
    cm = lorafx.compile(copy.deepcopy(model), config, options={"start": "compiled"})
    for name, path in paths.items():
        cm.load_adapter(path, name)
    return cm


def factors(cm: Any) -> int:
    """Bytes of the banks' factors."""
    banks = [group.bank for group in cm._session.program.groups]
    return sum(own.untyped_storage().nbytes() for bank in banks for own in (bank.A, bank.B))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    ids = torch.randint(3, 4096, (REQUESTS, 1), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = build_model(Sizes())
        paths = save_adapters(model, Path(folder))
        small = {name: path for name, path in paths.items() if name != "large"}
        plain = serve(model, small, max_rank=SMALL)
        shared = serve(model, paths, max_rank=LARGE, slot_rank=SMALL)
    equal = list(small)

    def step(cm: Any, names: list[str]) -> Any:
        return lambda: cm(input_ids=ids, use_cache=False, adapter_names=names)

    with torch.no_grad():
        arms = {"equal": step(shared, equal), "one large": step(shared, [*equal[:-1], "large"])}
        ratios = compare(step(plain, equal), arms, blocks=given.blocks)
    rows = [as_row(f"step, {ratio.arm}", ratio) | {"goal": STEP_GOAL} for ratio in ratios]
    row = factors(plain) // ((COUNT + 1) * SMALL)  # bytes of one rank
    memory = factors(shared) / (row * (COUNT * SMALL + LARGE))
    rows.append({"case": "memory", "ratio": memory, "bytes": factors(shared), "goal": MEMORY_GOAL})
    for ratio in ratios:
        print(f"step, {ratio.arm}: {ratio}")
    print(f"memory: {memory:.3f} of the adapters' own ranks")
    if given.out is not None:
        save(given.out, f"slots of rank {SMALL}, {COUNT} adapters of it and one of {LARGE}", rows)


if __name__ == "__main__":
    main()
