"""Jobs that leave files for lorafx's cache folder: what the chip reaches, and tuned tiles.

A machine that is lent for minutes starts with an empty cache. So the files are kept with the
results, and the queue puts them back for the jobs that build on them.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from typing import Any

import torch
from calibrate import calibrate, device_clock, save_chip
from gpu_job import Context, Rows
from gpu_linear import TINY, Case, cases
from gpu_protocol import clocks
from gpu_results import kept_row
from tune import tune

from lorafx.kernels.cost.chips import assumed_chip, chip_of
from lorafx.kernels.cpu.compiler import cache_folder
from lorafx.kernels.triton.build import tuned_file
from lorafx.kernels.triton.tiles import architecture_of


def calibrate_chip(context: Context) -> None:
    """Job: what `python benchmarks/calibrate.py` measures."""

    def one_call(what: str, call: Any) -> float:
        """A clock of a self-check: the call has to work; its time says nothing."""
        call()
        return 1.0

    def measured(device: torch.device) -> Rows:
        if context.tiny:
            chip = calibrate(chip_of(device), "self-check", device, one_call, scale=64)
        else:
            name = torch.cuda.get_device_name(device)
            chip = calibrate(assumed_chip(device), name, device, device_clock)
        return [
            kept_row(save_chip(chip), cache_folder(), asdict(chip)) | {"clocks after": clocks()}
        ]

    def summary(rows: Rows) -> str:
        chip = rows[0]["kept"]
        found = f"{chip['bandwidth'] / 1e12:.2f} TB/s, {chip['tensor_rate'] / 1e12:.0f} TFLOP/s, "
        found += f"a launch {chip['launch'] * 1e6:.2f} µs, "
        return f"{found}Triton over vendor {chip['triton_over_vendor']:.2f}"

    context.measure({"chip": context.device}, measured, summary)


def tune_tiles(context: Context, *, layer: str) -> None:
    """Job: the fastest tiles of "split" for one packed linear of Llama-3-8B, 64 rows of rank 16."""
    case = next(c for c in cases("llama-8b", "decode", "main") if c.name.endswith(f" {layer}"))
    most, timer = 40, None
    if context.tiny:  # by this clock every candidate is slower than the one before
        case, most, ticks = replace(TINY, rows=4), 2, itertools.count(1.0)
        timer = lambda tiles: next(ticks)  # noqa: E731

    def measured(case: Case) -> Rows:
        device = context.device
        found = tune(case.spec("split"), "split", case.rows, device, timer=timer, most=most)
        path = tuned_file(architecture_of(device))
        # The file has all winners of this cache, ours as the last: it has just been put there.
        row = kept_row(path, cache_folder(), json.loads(path.read_text())[-1:])
        row |= {"seconds": found.seconds, "heuristic": found.heuristic, "clocks": clocks()}
        return [row | {"timed": found.timed, "pruned": found.pruned}]

    def summary(rows: Rows) -> str:
        ours, usual = (rows[0][which] * 1e6 for which in ("seconds", "heuristic"))
        return f"{ours:.2f} µs, the heuristic's tiles {usual:.2f}"

    context.measure({case.label: case}, measured, summary)
