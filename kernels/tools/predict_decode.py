"""What the cost model predicts for decode, beside the goals of a step: a table for docs/kernels.md.

A step is four layers of Llama-3-8B and what an H200 took beside their linears at 64 rows (norms,
attention without a cache, an eighth of the head), which is taken to be alike for all batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from lorafx.kernels.cost.cost import estimate
from lorafx.kernels.cost.decode_cost import MEASURED, ahead, split
from lorafx.kernels.cost.work import START, Work

BEGIN, END = "<!-- predicted decode: begin -->", "<!-- predicted decode: end -->"
BATCHES, ADAPTERS, RANK = (1, 8, 32, 64, 128, 256), (1, 8, 32), 16
#: Least throughput of a step over the base's, by adapters; for 32 over the floor's.
GOALS: Mapping[int, float] = {1: 0.97, 8: 0.94, 32: 0.92}
#: Seconds of a layer of a step of the base: 64 rows, measured.
LAYER, MEASURED_ROWS = 946e-6 / 4, 64

Linears = Mapping[str, tuple[int, tuple[int, ...]]]
#: Seconds of one linear.
Model = Callable[[Work], float]


def _strategy(name: str, *, room: bool = False) -> Model:
    return lambda work: estimate(replace(work, room=room))[name].seconds


def _chosen(work: Work) -> str:
    return next(iter(estimate(work)))


def _ahead(work: Work) -> float:
    """What the plan takes, and "split" where it does by the form that starts ahead."""
    name = _chosen(work)
    return ahead(work) if name == "split" else estimate(work)[name].seconds


MODELS: Mapping[str, Model] = {
    "split, one by one": lambda work: split(work, MEASURED),
    "split": _strategy("split"),
    "split, ahead": ahead,
    "gemv": _strategy("gemv"),
    "segments": _strategy("segments"),
    "concat, room": _strategy("concat", room=True),
}


@dataclass(frozen=True)
class LayerLinears:
    """The linears of a layer, for one batch."""

    works: tuple[Work, ...]
    rest: float

    @property
    def base(self) -> float:
        return sum(work.vendor() for work in self.works)

    def over_base(self, model: Model) -> float:
        """Time of the linears over the vendor's GEMMs."""
        return sum(map(model, self.works)) / self.base

    def throughput(self, model: Model) -> float:
        """Of a step, over the base's."""
        return (self.base + self.rest) / (sum(map(model, self.works)) + self.rest)


def layers(linears: Linears) -> Iterator[LayerLinears]:
    def works(rows: int, distinct: int) -> tuple[Work, ...]:
        settings = (rows, distinct, RANK, torch.bfloat16)
        return tuple(Work(K, sizes, *settings) for K, sizes in linears.values())

    rest = LAYER - sum(work.vendor() for work in works(MEASURED_ROWS, 1))
    for rows in BATCHES:
        for distinct in ADAPTERS:
            if distinct <= rows:
                yield LayerLinears(works(rows, distinct), rest)


def table(linears: Linears) -> str:
    """Time over the vendor's GEMMs by way, and what that makes of a step."""
    heads = ["rows", "adapters", "floor", *MODELS, "plan", "step", "step, ahead", "goal"]
    lines = [BEGIN, f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for layer in layers(linears):
        rows, distinct = layer.works[0].rows, layer.works[0].distinct
        floor = layer.throughput(lambda work: work.floor() + START)
        goal = GOALS[distinct] * (floor if distinct == 32 else 1.0)
        names = list(dict.fromkeys(_chosen(work) for work in layer.works))
        steps = [layer.throughput(lambda work: estimate(work)[_chosen(work)].seconds)]
        steps.append(layer.throughput(_ahead))
        cells = [str(rows), str(distinct), f"{layer.over_base(lambda w: w.floor() + START):.2f}"]
        cells += [f"{layer.over_base(model):.2f}" for model in MODELS.values()]
        cells.append(", ".join(names))
        cells += [f"**{step:.3f}**" if step >= goal else f"{step:.3f}" for step in steps]
        lines.append(f"| {' | '.join([*cells, f'{goal:.3f}'])} |")
    return "\n".join([*lines, END])
