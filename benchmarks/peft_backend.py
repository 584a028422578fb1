"""A PEFT model with one adapter under torch.compile on a CPU: lorafx's backend beside Inductor.

A Llama of hidden 1024, intermediate 2816 and 6 layers, 8 requests, one PEFT adapter of rank 16 on
all its linears, fp32 and bf16, decode [8, 1] and prefill [8, 128]. Time over the base model
compiled by Inductor in the same run; the error is against the same model in float64:

    python benchmarks/peft_backend.py [--quick] [--dtype fp32|bf16] [--case decode|prefill]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from cpu_mixed import DTYPES, RANK, SHAPES, TARGETS, build_model
from peft import LoraConfig, PeftModel, get_peft_model
from protocol import as_row, compare, save
from torch import Tensor, nn
from transformers import LlamaForCausalLM

#: The arms other than the compiled base: how the PEFT model is compiled, None for eager.
ARMS = {
    'PEFT, backend="lorafx"': "lorafx",
    "PEFT, Inductor": "inductor",
    "PEFT, eager": None,
}


def build_models(layers: int, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PeftModel]:
    """The base, and a copy of it with one adapter whose B is not zero."""
    base = build_model(layers, torch.float32).requires_grad_(False)
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, inference_mode=True)
    peft_model = get_peft_model(copy.deepcopy(base), adapter).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
    return base.to(dtype), peft_model.to(dtype)


def call(model: Callable[..., object], ids: Tensor) -> Callable[[], object]:
    return lambda: model(input_ids=ids, use_cache=False)


def run_case(
    dtype_name: str, case: str, layers: int, blocks: int, seconds: float
) -> list[dict[str, object]]:
    torch._dynamo.reset()
    base, peft_model = build_models(layers, DTYPES[dtype_name])
    ids = torch.randint(0, base.config.vocab_size, SHAPES[case])
    with torch.no_grad():
        exact = copy.deepcopy(peft_model).double()(input_ids=ids, use_cache=False).logits
        arms, errors = {}, {}
        for name, backend in ARMS.items():
            # a copy each: one model's compiled code would count against the other's
            model = copy.deepcopy(peft_model)
            run = call(torch.compile(model, backend=backend) if backend else model, ids)
            got = run().logits.double()  # type: ignore[attr-defined]
            errors[name] = float((got - exact).abs().max() / exact.abs().max())
            arms[name] = run
        ratios = compare(call(torch.compile(base), ids), arms, blocks=blocks, seconds=seconds)
    label = f"{case} {list(SHAPES[case])} {dtype_name}"
    print(f"\n{label}, {layers} layers")
    rows = []
    for ratio in ratios:
        error = errors.get(ratio.arm)
        print(f"  {ratio.arm:24s} {ratio}" + ("" if error is None else f"  error {error:.1e}"))
        rows.append(as_row(label, ratio) | {"error": error})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 layers, 5 blocks; nothing saved")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--case", choices=SHAPES, action="append")
    parser.add_argument("--out", default="benchmarks/results/peft_backend.json")
    options = parser.parse_args()
    layers, blocks, seconds = (2, 5, 0.02) if options.quick else (6, 20, 0.1)
    rows = []
    title = "time over the base compiled by Inductor, Llama 1024/2816, one PEFT adapter, r=16"
    for dtype in options.dtype or DTYPES:
        for case in options.case or SHAPES:
            rows += run_case(dtype, case, layers, blocks, seconds)
            if not options.quick:  # what was measured stays if the run is cut short
                save(Path(options.out), title, rows)


if __name__ == "__main__":
    main()
