"""Arms of one packed linear beside the vendor's GEMM, and whether they are right.

An arm is made in two steps: `make(case, device)` once a case, which builds its kernels, and what it
returns once for each copy of the tensors, which gives the call that is timed. Only the second may
read the copy; whatever it needs beside (a weight with room behind its columns) it makes there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gpu_protocol
import protocol
import torch
from gpu_cases import LAYERS, TINY, Case, Copy
from gpu_job import Context, function_of
from gpu_jobs import ARMS, MIXES, Arm, arm_named
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.integrations.vllm.launches import launches
from lorafx.kernels.cost.roofline import GPU_STRATEGIES, estimate
from lorafx.kernels.triton.build import CONCAT, build, load_tuned, plan_of, tiles_for
from lorafx.kernels.triton.tiles import architecture_of

#: Largest error against float64, in units of the largest value, that a 16-bit result may have.
TOLERANCE = 2e-2
PREFILL_COPIES = 4
NO_ADAPTER = "no adapter"  # at the end of an arm's name: it computes the base alone

ArmOfCopy = Callable[[Copy], Callable[[], Tensor]]
#: By kernel, what of its tiles is different.
TileChanges = Mapping[str, Mapping[str, Any]]


class Unfit(Exception):
    """A case that an arm is not for; says why."""


# --- arms ---


def chosen(case: Case, device: torch.device) -> str:
    """The strategy that `plan` would take for the case."""
    return next(iter(estimate(case.work(device))))


def kernel_of(
    case: Case, strategy: str, device: torch.device, changes: TileChanges | None = None
) -> int:
    spec, tiles = case.spec(strategy), None
    if changes is not None:
        chosen = tiles_for(strategy, spec.delta, case.rows, architecture_of(device))
        tiles = {name: replace(own, **changes.get(name, {})) for name, own in chosen.items()}
    try:
        kernel = build(spec, strategy, rows_hint=case.rows, device=device, tiles=tiles)
    except LoweringError as reason:
        raise Unfit(f"{case.label}: {reason}") from reason
    if kernel is None:
        raise Unfit(f"{case.label}: no kernel is generated for {strategy}")
    return kernel


def strategy(
    case: Case, device: torch.device, *, name: str, changes: TileChanges | None = None
) -> ArmOfCopy:
    """One of lorafx's strategies, by name, with other tiles of some of its kernels."""
    if name == CONCAT:
        return function_of("gpu_concat:concat")(case, device)
    kernel = kernel_of(case, name, device, changes)
    return lambda copy: lambda: copy.lora(name, kernel)


def planned(case: Case, device: torch.device) -> ArmOfCopy:
    """The strategy that `plan` takes, with tuned tiles where the cache has some."""
    load_tuned(architecture_of(device))
    return strategy(case, device, name=chosen(case, device))


def in_vllm(case: Case, device: torch.device) -> ArmOfCopy:
    """What layers of vLLM call in CUDA graphs: kernels by the rows of a step, slots of its rows in
    a table for longer steps."""
    kernels = launches(case.spec("segments").delta, device)
    if kernels is None:
        raise Unfit(f"{case.label}: no kernels are generated")

    def make(copy: Copy) -> Callable[[], Tensor]:
        table = torch.full((2 * case.rows,), -1, dtype=torch.int32, device=device)
        table[: case.rows] = copy.owners
        bank = (copy.A, copy.B, copy.ranks, copy.scales, table)

        def call() -> Tensor:
            y = copy.base()
            torch.ops.lorafx.launch_delta_(y, copy.x, *bank, *kernels)
            return y

        return call

    return make


def nobody(case: Case, device: torch.device, *, name: str | None = None) -> ArmOfCopy:
    """A strategy, or what `plan` takes, with only base rows in the batch."""
    make = strategy(case, device, name=name or chosen(case, device))
    return lambda copy: make(replace(copy, owners=torch.full_like(copy.owners, -1)))


def made(arm: Arm, case: Case, device: torch.device) -> ArmOfCopy:
    """The arm for one case.

    Raises:
        Unfit: it is not for this case.
    """
    return function_of(arm.make)(case, device, **arm.arguments)


# --- right ---


def check(
    case: Case, copy: Copy, arms: Mapping[str, ArmOfCopy], plain: Sequence[str] = ()
) -> dict[str, float]:
    """Largest error of each arm against float64, over the largest value.

    Args:
        plain: arms that compute the base alone, beside those whose names end in NO_ADAPTER.

    Raises:
        RuntimeError: an arm is wrong, or not the same when it runs again.
    """
    exact = copy.exact()
    base = copy.x.double() @ copy.weight.double().T
    errors = {}
    for name, make in arms.items():
        want = base if name.endswith(NO_ADAPTER) or name in plain else exact
        call = make(copy)
        errors[name] = float((call().double() - want).abs().max() / want.abs().max())
        if not errors[name] < TOLERANCE:
            raise RuntimeError(f"{case.label}: {name} is off by {errors[name]:.2e} of the largest")
    return errors


def count_launches(
    case: Case, copy: Copy, strategy: str, meter: gpu_protocol.Meter
) -> dict[str, int]:
    """Kernels of one call of the base and of lorafx.

    Raises:
        RuntimeError: lorafx launches others than its plan has.
    """
    kernel = kernel_of(case, strategy, meter.device)
    base = meter.launches(copy.base)
    ours = meter.launches(lambda: copy.lora(strategy, kernel))
    planned = [k.jit.__name__ for k in plan_of(kernel).all_kernels]
    own = [name for name in ours if name in planned]
    if meter.measures and sorted(own) != sorted(planned):
        raise RuntimeError(f"{case.label}: {strategy} launched {ours}, planned {planned}")
    return {"base": len(base), "lorafx": len(ours)}


# --- fast ---


def copies_of(case: Case, meter: gpu_protocol.Meter) -> list[Copy]:
    """In prefill the activations alone flush the cache between calls, and FLOPs decide."""
    count = PREFILL_COPIES if meter.measures and not case.decode else meter.copies(case.nbytes)
    return [Copy.random(case, meter.device) for _ in range(count)]


def over_vendor(
    case: Case, copies: Sequence[Copy], arms: Mapping[str, ArmOfCopy], meter: gpu_protocol.Meter
) -> tuple[list[dict[str, object]], dict[str, Any]]:
    """Rows of results, A/A first, and the timed arms by name."""
    before = gpu_protocol.clocks()
    base = meter.arm([copy.base for copy in copies])
    timed = {name: meter.arm([make(copy) for copy in copies]) for name, make in arms.items()}
    ratios = meter.compare(base, timed)
    floor = case.floor(meter.device)
    extra = {
        "floor": floor,
        "copies": len(copies),
        "clocks before": before,
        "clocks after": gpu_protocol.clocks(),
    }
    rows = []
    for ratio in ratios:
        over = ratio.median / floor
        print(f"  {ratio.arm:32s} {ratio}  {over:.3f} of the floor", flush=True)
        row = protocol.as_row(case.label, ratio) | {"over_floor": over}
        rows.append(row | (extra if ratio.arm in arms else {}))
    return rows, timed


# --- jobs ---


def tiny_case(phase: str, arm: Arm) -> Case:
    """What a self-check runs of an arm: float16, which the interpreter gets right everywhere, or
    bfloat16 for what float16 is refused for."""
    case = replace(TINY[-1], prompts=True) if phase == "prefill" else TINY[-2]
    if arm.arguments.get("name") == CONCAT:
        case = replace(case, rows=24, dtype=torch.bfloat16)
    if arm.tiny is None:
        return case
    K, sizes, rows, distinct, rank = arm.tiny
    return replace(case, in_features=K, sizes=sizes, rows=rows, distinct=distinct, rank=rank)


def compare(context: Context, *, phase: str, part: str, arm: str) -> None:
    """Job: one arm over the vendor's GEMM, all packed linears of Llama-3-8B and all mixes."""
    entry = arm_named(arm)
    cases = [tiny_case(phase, entry)]
    if not context.tiny:
        cases = [
            Case("llama-8b", layer, K, sizes, *mix)
            for mix in MIXES[phase][part]
            for layer, (K, sizes) in LAYERS["llama-8b"].items()
        ]
    by_key = {case.label: case for case in cases}
    meter = gpu_protocol.Meter(context.device)
    for key in context.order(list(by_key)):
        with context.case(key):
            context.add(key, _compared(by_key[key], entry, meter, tiny=context.tiny))
            context.summarise(_ratios(context.part.rows, arm))


def _compared(
    case: Case, arm: Arm, meter: gpu_protocol.Meter, *, tiny: bool
) -> list[dict[str, object]]:
    print(case.label, flush=True)
    try:
        arms = {arm.name: made(arm, case, meter.device)}
    except Unfit as reason:
        if tiny:
            raise
        return [{"arm": arm.name, "case": case.label, "unfit": str(reason)}]
    copies = copies_of(case, meter)
    errors = check(case, copies[0], arms)
    counted = len(meter.launches(arms[arm.name](copies[0])))
    rows, _ = over_vendor(case, copies, arms, meter)
    about = {"launches": counted, "plan": chosen(case, meter.device), "error": errors[arm.name]}
    return [row | (about if row["arm"] == arm.name else {}) for row in rows]


def _ratios(rows: Sequence[Mapping[str, Any]], arm: str) -> str:
    """The arm's ratios, mix by mix: "8192/8: q/k/v 1.02, o 1.03"."""
    mixes: dict[str, list[str]] = {}
    for row in rows:
        if row.get("arm") != arm:
            continue
        words = row["key"].split()
        mix = "/".join(word.partition("=")[2] for word in words[-3:-1])
        found = f"{row['median']:.3f}" if "median" in row else "unfit"
        mixes.setdefault(mix, []).append(f"{words[1]} {found}")
    return "; ".join(f"{mix}: {', '.join(found)}" for mix, found in mixes.items())


#: Sizes that divide by little, beside those of the models.
ODD = {"wide": (2049, (2049,)), "siblings": (4100, (4100, 1030, 1030)), "conv": (1600, (4800,))}
#: (rows, adapters, rank) of the checks; in each, every fifth row has no adapter.
CHECKED = ((64, 8, 16), (8192, 8, 16), (1, 1, 16), (64, 32, 16), (512, 8, 16), (33, 5, 64))


def correct(context: Context, *, model: str) -> None:
    """Job: every strategy and arm against float64, at the sizes of a model."""
    layers = ODD if model == "odd sizes" else LAYERS[model]
    cases = [
        Case(model, layer, K, sizes, *mix, slots=max(32, mix[1]))
        for mix in CHECKED
        for layer, (K, sizes) in layers.items()
    ]
    pairs = [(case, arm) for case in cases for arm in _every_arm(case)]
    if context.tiny:  # each arm once
        pairs = [(tiny_case(_phase(case), arm), arm) for case, arm in pairs]
    by_key = {f"{case.label}: {arm.name}": (case, arm) for case, arm in pairs}
    for key in context.order(list(by_key)):
        with context.case(key):
            context.add(key, [_checked(*by_key[key], context)])
    found = [row["error"] for row in context.part.rows if "error" in row]
    context.summarise(f"{len(found)} right, largest error {max(found, default=0):.1e}")


def _phase(case: Case) -> str:
    return "decode" if case.decode else "prefill"


def _every_arm(case: Case) -> list[Arm]:
    """Strategies and arms to check: those of the case's phase, each once."""
    phase = _phase(case)
    arms = [arm for arm in ARMS if phase in arm.phases]
    known = {arm.name for arm in ARMS}
    make = "gpu_compare:strategy"
    others = [Arm(name, (phase,), make, {"name": name}) for name in GPU_STRATEGIES]
    # One that no arm has computes every v again: for small batches.
    small = case.rows * case.distinct <= 512
    return arms + [arm for arm in others if small and arm.name not in known]


def _checked(case: Case, arm: Arm, context: Context) -> dict[str, object]:
    torch.manual_seed(0)
    copy = Copy.random(case, context.device)
    copy.owners[4::5] = -1
    try:
        make = made(arm, case, context.device)
    except Unfit as reason:
        if context.tiny:
            raise
        return {"arm": arm.name, "unfit": str(reason)}
    error = check(case, copy, {arm.name: make})[arm.name]
    call = make(copy)
    if not torch.equal(call().clone(), call()):
        raise RuntimeError(f"{case.label}: {arm.name} gives other bits when it runs again")
    return {"arm": arm.name, "error": error}
