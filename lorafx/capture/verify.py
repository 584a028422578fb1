"""Numeric verification: the graph after each pass against the graph after `provenance`.

On the first real call each stage runs node by node on copies of the inputs. The first stage that
differs names the wrong pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafx.capture.record import Stage
from lorafx.errors import VerifyError
from lorafx.pass_order import GraphPass, way_around
from lorafx.torch_internals.graph_parts import tree_leaves

#: Of `difference`, by dtype: orders of accumulation differ, and errors grow over layers.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def difference(got: Tensor, want: Tensor) -> float:
    """max |got − want| / max(1, max |want|); infinite for unequal shapes or non-finite numbers."""
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    scale = max(1.0, float(want.double().abs().max()))
    error = float((got.double() - want.double()).abs().max()) / scale
    return error if error == error else float("inf")


def cloned(values: Sequence[Any]) -> list[Any]:
    """Copies of arguments that a graph may write into."""
    return [item.clone() if isinstance(item, Tensor) else item for item in values]


@dataclass
class NumericCheck:
    """The stages of a graph, compared on the first real inputs and then dropped."""

    title: str
    passes: Sequence[GraphPass]
    stages: list[Stage]

    def run(self, arguments: Sequence[Any], *, mixed: bool) -> None:
        """Compare all stages on `arguments`; mixed batches start at `provenance`, since earlier
        stages know no rows. Raises VerifyError for a stage that differs."""
        names = [stage.name for stage in self.stages]
        start = names.index("provenance") if mixed and "provenance" in names else 0
        # Fewer inputs: stages before `match` added those of unmarked uses.
        stages = [stage for stage in self.stages[start:] if stage.input_count == len(arguments)]
        reference = _results(stages[0], arguments)
        for stage in stages[1:]:
            results = _results(stage, arguments)
            for index, (want, got) in enumerate(zip(reference, results, strict=True)):
                if not isinstance(want, Tensor):
                    continue
                error = difference(got, want)
                if error > (TOLERANCE.get(want.dtype, 1e-4) if want.is_floating_point() else 0):
                    item = next(item for item in self.passes if item.name == stage.name)
                    raise VerifyError(
                        f"{self.title}: after pass {stage.name!r} output {index} differs by "
                        f"{error:.3g} of its largest magnitude, or of 1 where that is less. To "
                        f"serve the model nevertheless, {way_around(item)}"
                    )
        self.stages = []


def _results(stage: Stage, arguments: Sequence[Any]) -> list[Any]:
    with torch.no_grad():
        return tree_leaves(stage.graph(*cloned(arguments)))
