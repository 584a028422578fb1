"""Operators between graphs are looked at without Dynamo's tracing what looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lorafx.capture.tracking import Tracking


class Uses:
    """Looks at operators, by a function that Dynamo could trace."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def look(self, func: Any, operands: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        self.seen.append(func)
        _doubled(results)


def _doubled(results: Sequence[Tensor]) -> list[Tensor]:
    return [result * 2 for result in results]


@torch._dynamo.disable(recursive=False)
def _in_python(x: Tensor) -> Tensor:
    return x.sin()


def _function(x: Tensor) -> Tensor:
    return _in_python(x + 1) * 2


def _frames(*trackings: Tracking | None) -> int:
    """How many frames Dynamo looks at in a call inside of each of these."""
    torch._dynamo.reset()
    counters.clear()
    call = torch.compile(_function, backend="eager")
    for tracking in trackings:
        if tracking is None:
            call(torch.ones(3))
        else:
            tracking.run(lambda: call(torch.ones(3)))
    return int(counters["frames"]["total"])


def test_dynamo_traces_nothing_of_it() -> None:
    uses: Any = Uses()
    trackings = Tracking(None, uses), Tracking(None, uses)
    assert _frames(*trackings) == _frames(None, None)
    assert uses.seen.count(torch.ops.aten.sin.default) == 2
