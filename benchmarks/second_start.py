"""Time of a process's first call with `Options(cache=...)`: from an empty folder, and from the
graphs that the process before has saved.

Each start is a process of its own that builds a random Llama of hidden size 256, loads an adapter
of rank 16, compiles, and makes one mixed call of decode form [8, 1]. The time is that of the call.
Caches of Inductor and of kernels are empty at first too, and stay for the second start. `step` is
the time of a call afterwards, as the median of 50, whose guards are Dynamo's own or loaded ones.

    python benchmarks/second_start.py [--depth N] [--lowering reference] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from compile_time import spent
from protocol import in_process, save, save_adapter

ROWS = 8


def start(layers: int, lowering: str, folder: str) -> dict[str, Any]:
    """One start of this process: seconds of the first call, and what became of its graph."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lorafx

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1024,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    adapter = Path(folder) / "adapter"
    if not adapter.exists():
        save_adapter(model, adapter, 16, r".*layers.*_proj")
    cache = str(Path(folder) / "graphs")
    options = {"lowering": lowering, "cache": cache, "start": "compiled"}
    cm = lorafx.compile(model, {"a": str(adapter)}, options=options)
    ids = torch.arange(ROWS).unsqueeze(1)
    names = ["a", None] * (ROWS // 2)

    def call() -> Any:
        return cm(input_ids=ids, use_cache=False, adapter_names=names).logits

    first = spent(call)
    steps = [spent(call)["seconds"] for _ in range(50)]
    (record,) = cm._session.backend.records
    return {
        "seconds": first["seconds"],
        "cpu": first["cpu"] + first["compilers"],
        "step": statistics.median(steps),
        "graph": record.saved,
        "sum": float(call().double().sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, action="append", help="layers; 2 and 32 without it")
    parser.add_argument("--lowering", default="inductor")
    parser.add_argument("--out", help="a file for the rows; nothing is saved without it")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for layers in options.depth or [2, 32]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = __file__, "start", layers, options.lowering, folder
            pair = [in_process(*arguments, cache=Path(folder)) for _ in range(2)]
        assert pair[0]["sum"] == pair[1]["sum"], "the second start has another answer"
        for which, row in zip(("first", "second"), pair, strict=True):
            rows.append({"layers": layers, "start": which, **row})
            print(
                f"{layers:3d} layers, {which} start: {row['seconds']:6.2f} s, "
                f"{row['cpu']:6.2f} CPU s, step {row['step'] * 1e3:.2f} ms ({row['graph']})",
                flush=True,
            )
    if options.out:
        save(Path(options.out), f"first calls, Llama of hidden 256, {options.lowering}", rows)


if __name__ == "__main__":
    main()
