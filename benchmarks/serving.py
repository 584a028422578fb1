"""Continuous batching on a CPU with 0, 1, 8 and 32 adapters: tokens a second, time to first token.

64 requests arrive by a Poisson process, faster than they can be answered; which adapter each names
follows Zipf's law. The Llama of cpu_mixed.py, LoRA of rank 16 on all linears, greedy, fp32. Arms:

    transformers          its engine over the plain model, without adapters
    lorafx, 0 adapters    lorafx's engine, all requests for the base
    lorafx, n adapters    the same prompts and arrivals, n adapters in n slots
    PEFT generate         static batches of 8 with `adapter_names`, in order of arrival

A round runs all arms in random order; ratios are of tokens a second within a round, over those of
each engine without adapters.

    python benchmarks/serving.py [--quick] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cpu_mixed import RANK, TARGETS, build_model, peft_mixed, save_adapters
from peft import PeftModel
from protocol import save
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import lorafx
from lorafx.progress import progress

MOST = 32


@dataclass(frozen=True)
class Request:
    """Token ids, when they arrive (seconds from the start), and a place in Zipf's order."""

    prompt: list[int]
    arrives: float
    draw: float


@dataclass(frozen=True)
class Outcome:
    """Of one arm in one round: tokens a second, and the median time to a first token in seconds."""

    tokens: float
    first: float


def requests(count: int, rate: float, seed: int = 0) -> list[Request]:
    draw, at = random.Random(seed), 0.0
    found = []
    for _ in range(count):
        at += draw.expovariate(rate)
        prompt = [draw.randrange(3, 4096) for _ in range(draw.randrange(8, 64))]
        found.append(Request(prompt, at, draw.random()))
    return found


def adapter_of(request: Request, adapters: int) -> str | None:
    """Zipf: the k-th adapter is asked for in proportion to 1 / k."""
    if not adapters:
        return None
    shares = [1 / (k + 1) for k in range(adapters)]
    left = request.draw * sum(shares)
    for k, share in enumerate(shares):
        left -= share
        if left <= 0:
            return f"a{k}"
    return f"a{adapters - 1}"


def config() -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        page_size=16, num_blocks=1024, max_batch_tokens=256, max_requests_per_batch=16
    )


def run_engine(engine: Any, work: Sequence[Request], new: int, adapters: int | None) -> Outcome:
    """Feed the requests as they arrive. `adapters` is None for an engine that takes none."""
    started = time.perf_counter()
    waiting, done = list(work), []
    while len(done) < len(work):
        while waiting and time.perf_counter() - started >= waiting[0].arrives:
            request = waiting.pop(0)
            named = {} if adapters is None else {"adapter": adapter_of(request, adapters)}
            engine.add_request(request.prompt, max_new_tokens=new, record_timestamps=True, **named)
        output = engine.get_result(timeout=0.005)
        if output is not None and output.is_finished():
            if output.error is not None:
                raise RuntimeError(output.error)
            done.append(output)
    seconds = time.perf_counter() - started
    first = statistics.median(output.timestamps[0] - output.created_time for output in done)
    return Outcome(sum(len(output.generated_tokens) for output in done) / seconds, first)


def run_peft(model: Any, work: Sequence[Request], new: int, adapters: int, size: int) -> Outcome:
    """Batches of `size` in order of arrival, padded on the left; each starts when the one before it
    has ended and its requests are there. A first token comes when the whole batch has ended."""
    started, tokens, waits = time.perf_counter(), 0, []
    for at in range(0, len(work), size):
        batch = work[at : at + size]
        time.sleep(max(0.0, batch[-1].arrives - (time.perf_counter() - started)))
        length = max(len(request.prompt) for request in batch)
        ids = torch.tensor([[0] * (length - len(r.prompt)) + r.prompt for r in batch])
        names = [adapter_of(request, adapters) or "__base__" for request in batch]
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=(ids != 0).long(),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                adapter_names=names,
            )
        ended = time.perf_counter() - started
        tokens += out.shape[0] * (out.shape[1] - length)
        waits += [ended - request.arrives for request in batch]
    return Outcome(tokens / (time.perf_counter() - started), statistics.median(waits))


def check(model: Any, paths: dict[str, str], cm: Any, work: Sequence[Request]) -> None:
    """Greedy tokens of some requests are those of the merged model."""
    chosen = list(work[:3])
    names = ["a0", None, f"a{len(paths) - 1}"]
    outputs = cm.generate_batch(
        [r.prompt for r in chosen], names, continuous_batching_config=config(), max_new_tokens=8
    )
    for output, request, name in zip(outputs.values(), chosen, names, strict=True):
        plain = copy.deepcopy(model)
        if name is not None:
            plain = PeftModel.from_pretrained(plain, paths[name]).merge_and_unload()
        with torch.no_grad():
            want = plain.generate(
                torch.tensor([request.prompt]), max_new_tokens=8, do_sample=False
            )[0, len(request.prompt) :]
        if output.generated_tokens != want.tolist():
            raise RuntimeError(f"{name}: {output.generated_tokens}, not {want.tolist()}")


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    quick = arguments.quick
    layers, count, new = (2, 8, 4) if quick else (6, 64, 32)
    counts = [1, 2] if quick else [1, 8, MOST]
    model = build_model(layers, torch.float32)
    model.generation_config.eos_token_id = -1
    model.generation_config.pad_token_id = 0
    with progress(f"saving {max(counts)} adapters"):
        paths = save_adapters(model, folder, max(counts))
    lora = lorafx.LoraConfig(target_modules=TARGETS, max_adapters=max(counts), max_rank=RANK)
    cm = lorafx.compile(copy.deepcopy(model), lora, adapters=paths)
    work = requests(count, rate=1000.0 if quick else 50.0)
    check(model, paths, cm, work)
    peft_model = peft_mixed(model, dict(list(paths.items())[:8]))
    plain = copy.deepcopy(model)
    arms: dict[str, Callable[[], Outcome]] = {}

    def lorafx_arm(adapters: int) -> Callable[[], Outcome]:
        def run() -> Outcome:
            with cm.continuous_batching(None, config()) as engine:
                return run_engine(engine, work, new, adapters)

        return run

    def own_arm() -> Outcome:
        block = plain.continuous_batching_context_manager(continuous_batching_config=config())
        with block as engine:
            return run_engine(engine, work, new, None)

    arms["transformers"] = own_arm
    arms["lorafx, 0 adapters"] = lorafx_arm(0)
    arms.update({f"lorafx, {n} adapters": lorafx_arm(n) for n in counts})
    static = min(8, max(counts))
    arms["PEFT generate"] = lambda: run_peft(peft_model, work, new, static, 8)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in arms}
    draw = random.Random(0)
    for name, arm in arms.items():
        if name != "PEFT generate":  # which compiles nothing
            with progress(f"warming up: {name}"):
                arm()
    for index in range(1 if quick else arguments.rounds):
        order = list(arms)
        draw.shuffle(order)
        for name in order:
            with progress(f"round {index + 1}: {name}"):
                outcomes[name].append(arms[name]())
    return [row(name, outcomes) for name in arms]


def row(name: str, outcomes: dict[str, list[Outcome]]) -> dict[str, object]:
    """Medians over rounds, and the median and range of the ratios within each round."""
    own = outcomes[name]
    found: dict[str, object] = {
        "case": name,
        "tokens a second": statistics.median(outcome.tokens for outcome in own),
        "seconds to the first token": statistics.median(outcome.first for outcome in own),
    }
    for base in ("transformers", "lorafx, 0 adapters"):
        pairs = zip(own, outcomes[base], strict=True)
        ratios = sorted(a.tokens / b.tokens for a, b in pairs)
        found[f"tokens over {base}"] = [statistics.median(ratios), ratios[0], ratios[-1]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: results/serving.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    for found in rows:
        print(found)
    if not arguments.quick or arguments.out:
        out = arguments.out or Path(__file__).parent / "results" / "serving.json"
        save(out, "64 requests by continuous batching, on a CPU", rows)


if __name__ == "__main__":
    main()
