"""Requests for a thousand adapters in an engine with 16 slots: what a queue keeps on a CPU.

The model, the adapters and the traffic of adapter_store.py. An engine runs steps of up to 32
requests; 128 requests of 16 tokens and 16 new ones are under way at any time, each with an adapter
drawn by Zipf's law. Which of them share a step is the engine's choice.

    base     all requests have one adapter
    fits     the traffic is over as many adapters as there are slots
    queue    it is over all of them, which host memory holds

    kept = tokens a second of an arm / tokens a second of the base, in one round
    wait = the time from a request's arrival to its first token

    python benchmarks/adapter_queue.py [--adapters 1000] [--rounds 5] [--out results.json]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from adapter_store import Sizes, Traffic, build_model, save_adapters, serve
from protocol import save
from transformers.generation.configuration_utils import ContinuousBatchingConfig

#: Requests of a round, and of those how many are under way at any time, in steps of `Sizes.batch`.
REQUESTS, UNDER_WAY = 512, 4


def config_of(sizes: Sizes) -> ContinuousBatchingConfig:
    pages = -(-(sizes.prompt + sizes.new) // 16)
    return ContinuousBatchingConfig(
        page_size=16,
        num_blocks=2 * UNDER_WAY * sizes.batch * pages,
        max_batch_tokens=8 * sizes.batch,
        max_requests_per_batch=sizes.batch,
    )


def run_engine(cm: Any, sizes: Sizes, draw: Callable[[], str], requests: int) -> dict[str, float]:
    """Tokens a second, waits and loads of one engine that answers so many requests."""
    rng = random.Random(3)
    outputs = []
    with cm.continuous_batching(None, config_of(sizes)) as engine:

        def add() -> None:
            prompt = [rng.randrange(3, 4096) for _ in range(sizes.prompt)]
            ends: dict[str, Any] = {"max_new_tokens": sizes.new, "ignore_eos": True}
            engine.add_request(prompt, adapter=draw(), record_timestamps=True, **ends)

        before, start = cm.stats(), time.perf_counter()
        under_way = min(requests, UNDER_WAY * sizes.batch)
        for _ in range(under_way):
            add()
        while len(outputs) < requests:
            output = engine.get_result(timeout=1)
            if output is None or not output.is_finished():
                continue
            if output.error is not None:
                raise RuntimeError(output.error)
            outputs.append(output)
            if under_way < requests:
                add()
                under_way += 1
        seconds, after = time.perf_counter() - start, cm.stats()
    waits = [output.timestamps[0] - output.created_time for output in outputs]
    return {
        "tokens a second": requests * sizes.new / seconds,
        "wait p50": statistics.median(waits),
        "wait p99": statistics.quantiles(waits, n=100)[98],
        "longest wait": max(waits),
        "loads": (after.loads - before.loads) / requests,
        "passed over": (after.waits - before.waits) / requests,
    }


def run(sizes: Sizes, folder: Path, *, rounds: int, requests: int) -> list[dict[str, Any]]:
    model = build_model(sizes)
    cm = serve(model, save_adapters(model, folder, sizes.adapters), sizes, {}, None)
    counts = {"base": 1, "fits": sizes.slots, "queue": sizes.adapters}
    draws = {case: Traffic(cm.adapters, count, 1) for case, count in counts.items()}
    found: dict[str, list[dict[str, float]]] = {case: [] for case in counts}
    for number in range(-1, rounds):  # the first one compiles
        for case in random.Random(number).sample(list(counts), len(counts)):
            traffic = draws[case]
            outcome = run_engine(cm, sizes, lambda draw=traffic: draw()[0], requests)
            if number >= 0:
                found[case].append(outcome)
    rows = []
    for case, outcomes in found.items():
        medians = {key: statistics.median(o[key] for o in outcomes) for key in outcomes[0]}
        speed = "tokens a second"
        kept = [o[speed] / b[speed] for o, b in zip(outcomes, found["base"], strict=True)]
        rows.append({"case": case, **medians, "kept": kept})
        print(case, {k: round(v, 3) for k, v in medians.items()}, [round(k, 3) for k in kept])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--out", type=Path)
    given = vars(parser.parse_args())
    out, settings = given.pop("out"), {name: given.pop(name) for name in ("rounds", "requests")}
    sizes = Sizes(**given)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows = run(sizes, Path(folder), **settings)
    if out is not None:
        save(out, f"{sizes}, {settings}: an engine over one adapter's throughput", rows)


if __name__ == "__main__":
    main()
