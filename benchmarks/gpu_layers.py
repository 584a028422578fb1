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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_protocol
import peers
import protocol
import torch
from gpu_cases import LAYERS, TINY, Case, Copy, cases
from torch import Tensor

from lorafx.kernels.cost.cost import GPU_STRATEGIES, choose_strategy
from lorafx.kernels.tools.tune import tune
from lorafx.kernels.triton.triton_build import build, plan_of

#: Peers' time over lorafx's in decode, of docs/performance.md: goal, stretch.
PEER_GOALS = (1.25, 1.5)
PREFILL_COPIES = 4
AUTOTUNED = "Inductor max-autotune, no LoRA"
#: Largest error against float64, in units of the largest value, that a 16-bit result may have.
TOLERANCE = 2e-2

ArmOfCopy = Callable[[Copy], Callable[[], Tensor]]


class _Sizes:
    """A sibling as the cost model asks for it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.in_features = in_features
        self.out_features = out_features


def chosen(case: Case, device: torch.device) -> str:
    """The strategy that `plan` would take for the case."""
    sites = [_Sizes(case.in_features, size) for size in case.sizes]
    slots = max(case.distinct, 1)
    return choose_strategy(sites, case.rows, slots, case.rank, case.dtype, device)[0]


def kernel_of(case: Case, strategy: str, device: torch.device) -> int:
    kernel = build(case.spec(strategy), strategy, rows_hint=case.rows, device=device)
    if kernel is None:
        raise RuntimeError(f"{case.label}: no kernel is generated for {strategy}")
    return kernel


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
    for strategy in strategies:
        kernel = kernel_of(case, strategy, device)
        arms[f"lorafx {strategy}"] = lambda copy, s=strategy, k=kernel: lambda: copy.lora(s, k)
    if case.distinct:
        first = strategies[0]
        kernel = kernel_of(case, first, device)
        arms[f"lorafx {first}, no adapter"] = lambda copy: _off(copy, first, kernel)
        for package, make in found.items():
            arms[package] = lambda copy, m=make: m(copy.peer())
    return arms


def _off(copy: Copy, strategy: str, kernel: int) -> Callable[[], Tensor]:
    """The same kernels with only base rows in the batch."""
    nobody = torch.full_like(copy.owners, -1)
    return lambda: copy.lora(strategy, kernel, nobody)


def check(case: Case, copy: Copy, arms: dict[str, ArmOfCopy]) -> dict[str, float]:
    """Largest error of each arm against float64, over the largest value.

    Raises:
        RuntimeError: an arm is wrong.
    """
    exact = copy.exact()
    plain = copy.x.double() @ copy.weight.double().T
    errors = {}
    for name, make in arms.items():
        want = plain if name.endswith("no adapter") or name == AUTOTUNED else exact
        errors[name] = float((make(copy)().double() - want).abs().max() / want.abs().max())
        if not errors[name] < TOLERANCE:
            raise RuntimeError(f"{case.label}: {name} is off by {errors[name]:.2e} of the largest")
    return errors


def count_launches(case: Case, copy: Copy, strategy: str, device: torch.device) -> dict[str, int]:
    """Kernels of one call of the base and of lorafx.

    Raises:
        RuntimeError: lorafx launches others than its plan has.
    """
    kernel = kernel_of(case, strategy, device)
    base = gpu_protocol.launches(copy.base)
    ours = gpu_protocol.launches(lambda: copy.lora(strategy, kernel))
    planned = [k.jit.__name__ for k in plan_of(kernel).all_kernels]
    own = [name for name in ours if name in planned]
    if sorted(own) != sorted(planned):
        raise RuntimeError(f"{case.label}: {strategy} launched {ours}, planned {planned}")
    return {"base": len(base), "lorafx": len(ours)}


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
        for strategy in strategies:
            tune(case.spec(strategy), strategy, case.rows, device, most=options.tune)
    free = torch.cuda.mem_get_info(device)[0]
    # In prefill the activations alone flush the cache between calls, and FLOPs decide.
    count = gpu_protocol.copies_for(case.nbytes, free) if case.decode else PREFILL_COPIES
    copies = [Copy.random(case, device) for _ in range(count)]
    arms = arms_of(case, device, strategies, found, autotune=options.max_autotune)
    errors = check(case, copies[0], arms)
    counted = count_launches(case, copies[0], first, device)
    before = gpu_protocol.clocks()
    base = gpu_protocol.graph_arm([copy.base for copy in copies])
    graphs = {
        name: gpu_protocol.graph_arm([make(copy) for copy in copies]) for name, make in arms.items()
    }
    settings: dict[str, Any] = {"blocks": options.blocks, "seconds": options.seconds}
    settings["timer"] = gpu_protocol.event_time
    ratios = protocol.compare(base, graphs, **settings)
    floor = case.floor(device)
    extra = {
        "floor": floor,
        "strategy": first,
        "copies": count,
        "launches": counted,
        "clocks before": before,
        "clocks after": gpu_protocol.clocks(),
    }
    rows = []
    print(f"\n{case.label}: {first}, {counted['lorafx']} launches, floor {floor:.3f}")
    for ratio in ratios:
        over = ratio.median / floor
        print(f"  {ratio.arm:32s} {ratio}  {over:.3f} of the floor")
        row = protocol.as_row(case.label, ratio) | extra
        rows.append(row | {"over_floor": over, "error": errors.get(ratio.arm)})
    theirs = {name: graphs[name] for name in found if name in graphs}
    if theirs:
        for ratio in protocol.compare(graphs[f"lorafx {first}"], theirs, **settings)[1:]:
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
        errors = check(case, copy, arms)
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
