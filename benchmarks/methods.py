"""What adapters of other methods than LoRA cost in a mixed batch on a CPU.

A Llama of hidden 1024 and 6 layers, eight requests with eight adapters of one method, each on all
linears (IA³: k, v and down). Over the same step of the base, compiled by Inductor:

    decode     one token for each request
    prefill    16 tokens for each request
    peft       one adapter's step in PEFT, in eager mode, over the same base

    python benchmarks/methods.py [--blocks 20] [--method OFT ...] [--out results.json]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from adapter_store import TARGETS, Sizes, build_model
from protocol import Ratio, as_row, compare, save

import lorafx

REQUESTS = 8
TO: Mapping[str, Any] = {"target_modules": TARGETS}
METHODS: Mapping[str, peft.PeftConfig] = {
    "LoRA, r = 16": peft.LoraConfig(r=16, init_lora_weights=False, **TO),
    "LoHa, r = 4": peft.LoHaConfig(r=4, init_weights=False, **TO),
    "VeRA, r = 256": peft.VeraConfig(r=256, init_weights=False, **TO),
    "IA³": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "OFT, b = 32": peft.OFTConfig(r=0, oft_block_size=32, init_weights=False, **TO),
    "LoKr": peft.LoKrConfig(r=64, decompose_factor=16, init_weights=False, **TO),
}


def saved(model: Any, config: peft.PeftConfig, folder: Path) -> dict[str, str]:
    """The paths of the adapters, with numbers near those of an untrained one."""
    paths = {}
    for index in range(REQUESTS):
        torch.manual_seed(index)
        own = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
        for name, parameter in own.named_parameters():
            if parameter.requires_grad and "base_layer" not in name:
                parameter.data.add_(0.02 * torch.randn_like(parameter))
        own.save_pretrained(str(folder / f"a{index}"))
        paths[f"a{index}"] = str(folder / f"a{index}")
    return paths


def measured(
    model: Any, base: Any, method: str, ids: torch.Tensor, blocks: int
) -> tuple[list[Ratio], float]:
    """The ratios over the base, and how far one adapter's logits are from PEFT's."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        paths = saved(model, METHODS[method], Path(folder))
        cm: Any = lorafx.compile(
            copy.deepcopy(model), paths, dynamic=True, options={"start": "compiled"}
        )
        eager = peft.PeftModel.from_pretrained(copy.deepcopy(model), paths["a0"]).eval()
        alone = cm(ids, use_cache=False, adapter_names=["a0"] * REQUESTS).logits
        worst = float((alone - eager(input_ids=ids, use_cache=False).logits).abs().max())
        arms = {
            "mixed": lambda: cm(ids, use_cache=False, adapter_names=[*paths]),
            "peft": lambda: eager(input_ids=ids, use_cache=False),
        }
        ratios = compare(lambda: base(input_ids=ids, use_cache=False), arms, blocks=blocks)
    return ratios, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = build_model(Sizes(hidden=1024, layers=6))
    base = torch.compile(copy.deepcopy(model), dynamic=True)
    draw = torch.Generator().manual_seed(1)
    work = {
        "decode": torch.randint(3, 4096, (REQUESTS, 1), generator=draw),
        "prefill": torch.randint(3, 4096, (REQUESTS, 16), generator=draw),
    }
    rows: list[dict[str, Any]] = []
    for method in given.method or METHODS:
        for what, ids in work.items():
            ratios, worst = measured(model, base, method, ids, given.blocks)
            for ratio in ratios:
                case = f"{method}, {what}, {ratio.arm}"
                rows.append(as_row(case, ratio) | {"difference from peft": worst})
                print(f"{case}: {ratio}, {worst:.1e} from PEFT", flush=True)
    if given.out is not None:
        save(given.out, f"{REQUESTS} requests, as many adapters of a method", rows)


if __name__ == "__main__":
    main()
