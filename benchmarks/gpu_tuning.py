"""Jobs that leave files for lorafx's cache folder: what the chip reaches, and tuned tiles.

A machine that is lent for minutes starts with an empty cache. So the files are kept with the
results, and the queue puts them back for the jobs that build on them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_protocol
import torch
from calibrate import calibrate, device_clock, save_chip
from gpu_cases import LAYERS, TINY, Case
from gpu_job import Context
from tune import Timer, tune

from lorafx.kernels.cost.roofline import assumed_chip, chip_of
from lorafx.kernels.cpu.compiler import cache_folder
from lorafx.kernels.triton.build import tuned_file
from lorafx.kernels.triton.tiles import architecture_of


def _kept(path: Path, value: Any) -> dict[str, Any]:
    """What the queue restores."""
    return {"file": str(path.relative_to(cache_folder())), "kept": value}


def calibrate_chip(context: Context) -> None:
    """Job: what `python benchmarks/calibrate.py` measures."""
    key, device = "chip", context.device
    if not context.order([key]):
        return
    with context.case(key):
        if context.tiny:
            name, assumed, clock, scale = "self-check", chip_of(device), _one_call, 64
        else:
            name, assumed = torch.cuda.get_device_name(device), assumed_chip(device)
            clock, scale = device_clock, 1
        chip = calibrate(assumed, name, device, clock, scale=scale)
        clocks = {"clocks after": gpu_protocol.clocks()}
        context.add(key, [_kept(save_chip(chip), asdict(chip)) | clocks])
        context.summarise(
            f"{chip.bandwidth / 1e12:.2f} TB/s, {chip.tensor_rate / 1e12:.0f} TFLOP/s, a launch "
            f"{chip.launch * 1e6:.2f} µs, Triton over vendor {chip.triton_over_vendor or 0:.2f}"
        )


def _one_call(what: str, call: Any) -> float:
    """A clock of a self-check: the call has to work; its time says nothing."""
    call()
    return 1.0


def tune_tiles(
    context: Context, *, strategy: str, layer: str, rows: int, rank: int, most: int
) -> None:
    """Job: the fastest tiles of a strategy for one packed linear of Llama-3-8B."""
    case, timer = replace(TINY[-1], rows=4), _first_is_best()
    if not context.tiny:
        K, sizes = LAYERS["llama-8b"][layer]
        case, timer = Case("llama-8b", layer, K, sizes, rows, 8, rank), None
    if not context.order([case.label]):
        return
    with context.case(case.label):
        device = context.device
        most = 2 if context.tiny else most
        found = tune(case.spec(strategy), strategy, case.rows, device, timer=timer, most=most)
        path = tuned_file(architecture_of(device))
        # The file has all winners of this cache, ours as the last: it has just been put there.
        row = _kept(path, json.loads(path.read_text())[-1:])
        row |= {"seconds": found.seconds, "heuristic": found.heuristic}
        row |= {"timed": found.timed, "pruned": found.pruned, "clocks": gpu_protocol.clocks()}
        context.add(case.label, [row])
        micro = found.seconds * 1e6, found.heuristic * 1e6
        context.summarise(f"{micro[0]:.2f} µs, the heuristic's tiles {micro[1]:.2f}")


def _first_is_best() -> Timer:
    """A timer of a self-check, by which every candidate is slower than the one before."""
    times = iter(range(1, 1000))
    return lambda tiles: float(next(times))
