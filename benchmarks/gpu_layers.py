"""One packed linear with LoRA on a GPU: lorafx's strategies beside the vendor GEMM and the peers.

    python benchmarks/gpu_layers.py [--minutes 8] [--model llama-8b] [--all-strategies] [--tune N]
        [--max-autotune] [--vllm-wheel PATH] [--sglang-wheel PATH]

For each linear of a model and each batch of gpu_cases.MIXES: time over the vendor GEMM's (the A/A
pair is the noise), over the modelled floor, and the peers' Triton ops (peers.py) over lorafx. Every
arm is a CUDA graph over at least 20 copies of weights and banks, in A B B A blocks; launches are
counted; results are compared with float64. `--self-check` builds and checks every arm for tiny
cases on the CPU, kernels in Triton's interpreter, and measures nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_protocol
import peers
import protocol
import torch
from gpu_cases import LAYERS, TINY, Case, Copy, cases
from gpu_compare import (
    NO_ADAPTER,
    ArmOfCopy,
    Unfit,
    check,
    chosen,
    copies_of,
    count_launches,
    nobody,
    over_vendor,
    strategy,
)
from gpu_job import Context
from tune import tune

from lorafx.kernels.cost.roofline import GPU_STRATEGIES

#: Peers' time over lorafx's in decode, of docs/performance.md: goal, stretch.
PEER_GOALS = (1.25, 1.5)
AUTOTUNED = "Inductor max-autotune, no LoRA"
PEER_MIXES = ((64, 8, 16), (64, 1, 16), (8192, 8, 16))


def arms_of(
    case: Case,
    device: torch.device,
    strategies: Sequence[str],
    found: dict[str, Any],
    *,
    autotune: bool = False,
) -> dict[str, ArmOfCopy]:
    """Every arm beside the base, by name; `found` holds what makes the peers' arms."""
    arms: dict[str, ArmOfCopy] = {}
    if autotune:
        product = torch.compile(torch.nn.functional.linear, mode="max-autotune-no-cudagraphs")
        arms[AUTOTUNED] = lambda copy: lambda: product(copy.x, copy.weight)
    for name in strategies:
        try:
            arms[f"lorafx {name}"] = strategy(case, device, name=name)
        except Unfit as reason:
            print(f"left out: {reason}")
    if case.distinct:
        arms[f"lorafx {strategies[0]}, {NO_ADAPTER}"] = nobody(case, device, name=strategies[0])
        for package, make in found.items():
            arms[package] = lambda copy, m=make: m(copy.peer())
    return arms


def measure(
    case: Case,
    device: torch.device,
    options: argparse.Namespace,
    found: dict[str, Any],
) -> list[dict[str, object]]:
    """Rows of results of one case."""
    first = chosen(case, device)
    strategies = [first]
    if options.all_strategies:
        strategies += [name for name in GPU_STRATEGIES if name != first]
    if options.tune:
        for name in strategies:
            tune(case.spec(name), name, case.rows, device, most=options.tune)
    meter = gpu_protocol.Meter(device, options.blocks, options.seconds)
    copies = copies_of(case, meter)
    arms = arms_of(case, device, strategies, found, autotune=options.max_autotune)
    errors = check(case, copies[0], arms, plain=[AUTOTUNED])
    counted = count_launches(case, copies[0], first, meter)
    floor = case.floor(device)
    print(f"\n{case.label}: {first}, {counted['lorafx']} launches, floor {floor:.3f}")
    rows, graphs = over_vendor(case, copies, arms, meter)
    extra = {"floor": floor, "strategy": first, "copies": len(copies), "launches": counted}
    rows = [row | extra | {"error": errors.get(str(row["arm"]))} for row in rows]
    theirs = {name: graphs[name] for name in found if name in graphs}
    if theirs:
        for ratio in meter.compare(graphs[f"lorafx {first}"], theirs)[1:]:
            verdict = ""
            if case.decode:
                reached = [goal for goal in PEER_GOALS if ratio.low >= goal]
                verdict = f"  goal {PEER_GOALS[0]} {'reached' if reached else 'not reached'}"
            print(f"  {ratio.arm:32s} {ratio} of lorafx's time{verdict}")
            rows.append(protocol.as_row(f"{case.label}, over lorafx {first}", ratio) | extra)
    return rows


def self_check(options: argparse.Namespace) -> int:
    """Build and check every arm of the tiny cases on the CPU; returns how many were checked."""
    found = _peers(options)
    device = torch.device("cpu")
    done = 0
    for case in TINY:
        copy = Copy.random(case, device)
        arms = arms_of(case, device, list(GPU_STRATEGIES), found)
        errors = check(case, copy, arms, plain=[AUTOTUNED])
        worst = max(errors.values())
        print(f"{case.label}: {len(errors)} arms, plan {chosen(case, device)}, error {worst:.1e}")
        done += len(errors)
    for model in LAYERS:
        for case in cases(model):
            floor = case.floor(device)
            assert floor >= 1.0, case.label
            assert gpu_protocol.copies_for(case.nbytes) >= gpu_protocol.COPIES
            assert chosen(case, device) in GPU_STRATEGIES
    print(f"{done} arms are right; nothing was measured")
    return done


def run_peer(context: Context, *, package: str, layer: str) -> None:
    """Job: lorafx and the ops of one peer beside the vendor's GEMM, and the peer over lorafx."""
    cases = [TINY[3]]  # one row: the interpreter takes its time for the kernels of vLLM
    if not context.tiny:
        K, sizes = LAYERS["llama-8b"][layer]
        cases = [Case("llama-8b", layer, K, sizes, *mix) for mix in PEER_MIXES]
    options = parse([])
    make = peers.find(package, peers.at_hand(package))
    if isinstance(make, str):
        raise FileNotFoundError(f"{make}, or {package}.zip in the folder of --peers")
    by_key = {case.label: case for case in cases}
    for key in context.order(list(by_key)):
        with context.case(key):
            context.add(key, measure(by_key[key], context.device, options, {package: make}))
    over = [
        f"{row['median']:.2f}"
        for row in context.part.rows
        if row["arm"] == package and ", over lorafx" in row["case"]
    ]
    context.summarise(f"{package} over lorafx {', '.join(over)}")


def _peers(options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for package, wheel in (("vllm", options.vllm_wheel), ("sglang", options.sglang_wheel)):
        make = peers.find(package, wheel)
        if isinstance(make, str):
            print(make, file=sys.stderr)
        else:
            found[package] = make
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--model", choices=LAYERS, default="llama-8b")
    parser.add_argument("--mix", action="append", metavar="M,D,r", help="of gpu_cases.MIXES; all")
    parser.add_argument("--all-strategies", action="store_true", help="not only the planned one")
    parser.add_argument("--tune", type=int, metavar="N", help="time N tiles a kernel set first")
    parser.add_argument("--max-autotune", action="store_true", help="Inductor's GEMM as an arm")
    parser.add_argument("--blocks", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=0.004, help="of one timing")
    parser.add_argument("--vllm-wheel", type=Path)
    parser.add_argument("--sglang-wheel", type=Path)
    parser.add_argument("--self-check", action="store_true", help="on the CPU; measures nothing")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.self_check:
        if (options.vllm_wheel or options.sglang_wheel) and "TRITON_INTERPRET" not in os.environ:
            # Peers' kernels are interpreted only if triton was imported with this set.
            environment = {**os.environ, "TRITON_INTERPRET": "1"}
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
        self_check(options)
        return
    device = gpu_protocol.require_gpu("gpu_layers.py")
    budget, rows = gpu_protocol.Budget(options.minutes), []
    found = _peers(options)
    for case in cases(options.model):
        if options.mix and f"{case.rows},{case.distinct},{case.rank}" not in options.mix:
            continue
        if not budget.fits(case.label):
            continue
        start = time.monotonic()
        rows += measure(case, device, options, found)
        torch.cuda.empty_cache()
        budget.took(time.monotonic() - start)
    if budget.left_out:
        print(f"\nleft out for want of time: {'; '.join(budget.left_out)}")
    out = options.out or Path(f"benchmarks/results/gpu_layers_{options.model}.json")
    title = f"time over the vendor GEMM, packed linears of {options.model}"
    protocol.save(out, title, rows, machine_of=lambda: gpu_protocol.gpu_machine(device))


if __name__ == "__main__":
    main()
