"""vLLM's engine on a CPU with lorafx's LoRA, and with its own, over its base without LoRA.

The Llama of cpu_mixed.py in engines of their own, which take turns as in `lorafx bench`; greedy.
Base engines have no LoRA and are compiled; of vLLM's own LoRA vLLM compiles nothing on a CPU.

    decode      a step of 8 and of 32 requests, with 0, 1 and 8 adapters of 8 slots
    prefill     8 prompts of 256 tokens in one step, 8 adapters
    requests    64 prompts of 8 to 64 tokens, 32 new tokens each, 8 adapters: seconds for all

A round is `--blocks` blocks; each figure is the median of its round, and the range is over rounds.
The floor of a case is the bytes of all linears and of the distinct adapters' factors, over those
of the linears.

    make vllm
    python benchmarks/vllm_lora.py --python .venv-vllm/bin/python [--dtype bf16] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpu_mixed import ADAPTERS, DTYPES, RANK, build_model, save_adapters
from protocol import compare, machine, save
from vllm_serving import Peer

OUT = Path("benchmarks/results/vllm_cpu.json")
NAMES = {"fp32": "float32", "bf16": "bfloat16"}
VOCABULARY = 4096


def floor(model: Any, adapters: int) -> float:
    """Bytes of a decode step with that many distinct adapters over those without."""
    linears = [layer.weight.shape for layer in model.modules() if hasattr(layer, "in_features")]
    targets = linears[:-1]  # the head has no LoRA
    factors = adapters * RANK * sum(n + k for n, k in targets)
    return 1 + factors / sum(n * k for n, k in linears)


def work(
    rows: int, length: int, adapters: int, new: int, seed: int = 0
) -> tuple[list[dict[str, Any]], int]:
    """Requests that arrive at once, row r with adapter r mod `adapters`, and their new tokens."""
    draw = random.Random(seed)
    return [
        {
            "prompt": [
                draw.randrange(3, VOCABULARY) for _ in range(length or draw.randrange(8, 64))
            ],
            "arrives": 0.0,
            "adapter": f"a{row % adapters}" if adapters else None,
        }
        for row in range(rows)
    ], new


def decode(peer: Peer, rows: int, adapters: int) -> Callable[[], float]:
    """Seconds of a step in which all rows decode."""
    requests = work(rows, 8, adapters, 25)
    return lambda: statistics.median(peer.run(*requests)["steps"][4:])


def prefill(peer: Peer, adapters: int) -> Callable[[], float]:
    requests = work(8, 256, adapters, 1)
    return lambda: peer.run(*requests)["seconds"]


def throughput(peer: Peer, adapters: int) -> Callable[[], float]:
    requests = work(64, 0, adapters, 32)
    return lambda: peer.run(*requests)["seconds"]


def cases(base: Peer, ours: Peer, stock: Peer) -> dict[str, tuple[Any, dict[str, Any], int]]:
    """Base, arms, and the adapters of the floor by name; stock prefills take too long for more."""
    found: dict[str, tuple[Any, dict[str, Any], int]] = {}
    for rows in (8, 32):
        for adapters in (0, 1, 8):
            arms = {"lorafx": decode(ours, rows, adapters)}
            if adapters == 8:
                arms["vLLM"] = decode(stock, rows, adapters)
            found[f"decode, {rows} rows, {adapters} adapters"] = (
                *(decode(base, rows, 0), arms, adapters),
            )
    found["prefill, 8 x 256, 8 adapters"] = prefill(base, 0), {"lorafx": prefill(ours, 8)}, 0
    found["64 requests, 8 adapters"] = throughput(base, 0), {"lorafx": throughput(ours, 8)}, 8
    return found


def run_dtype(python: Path, dtype: str, rounds: int, blocks: int) -> list[dict[str, object]]:
    model = build_model(6, DTYPES[dtype])
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        paths = save_adapters(model, Path(folder), ADAPTERS)
        sizes = {"rank": RANK, "most_requests": 32, "most_tokens": 2048, "length": 320}
        peers = [
            Peer(python, Path(folder, "model"), given, dtype=NAMES[dtype], lorafx=on, **sizes)
            for given, on in (({}, False), (paths, True), (paths, False))
        ]
        print("engines have started", file=sys.stderr, flush=True)
        try:
            figures: dict[tuple[str, str], list[Any]] = {}
            for number in range(rounds):
                for name, (base, arms, _) in cases(*peers).items():
                    for ratio in compare(
                        *(base, arms),
                        blocks=blocks,
                        seed=number,
                        timer=lambda arm, _: arm(),
                    ):
                        figures.setdefault((name, ratio.arm), []).append(ratio)
            slow = prefill(peers[2], 8)() / prefill(peers[0], 0)()
        finally:
            for peer in peers:
                peer.close()
        for (name, arm), ratios in figures.items():
            adapters = cases(*peers)[name][2]
            medians = [ratio.median for ratio in ratios]
            rows.append(
                {
                    "case": f"{name}, {dtype}",
                    "arm": arm,
                    "over_base": medians,
                    "floor": round(floor(model, adapters), 3),
                    "milliseconds": [ratio.milliseconds for ratio in ratios],
                }
            )
            print(
                f"{name:32s} {dtype} {arm:7s} {min(medians):.3f} to {max(medians):.3f}, floor "
                f"{floor(model, adapters):.3f}, {ratios[-1].milliseconds:.2f} ms",
                flush=True,
            )
        rows.append(
            {"case": f"prefill, 8 x 256, 8 adapters, {dtype}", "arm": "vLLM", "over_base": [slow]}
        )
        print(f"vLLM's own prefill, once: {slow:.2f}")
    return rows


def machine_of(python: Path) -> dict[str, object]:
    """Of this process, with the packages of vLLM's."""
    asked = "torch", "transformers", "vllm-cpu"
    code = "import json, sys; from importlib.metadata import version as v\n"
    code += "print(json.dumps({name: v(name) for name in sys.argv[1:]}))"
    found = subprocess.run(
        [str(python), "-c", code, *asked], capture_output=True, text=True, check=True
    )
    return machine() | json.loads(found.stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="one that has vLLM and lorafx")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    rows = []
    for dtype in given.dtype or DTYPES:
        rows += run_dtype(given.python, dtype, given.rounds, given.blocks)
    save(given.out, "time over vLLM's base without LoRA", rows, lambda: machine_of(given.python))


if __name__ == "__main__":
    main()
