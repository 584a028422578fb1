"""Noting what a graph returns takes work in proportion to what it takes and returns."""

from __future__ import annotations

import torch
from python_calls import calls_of

from lorafx.ownership.memory import Memory
from lorafx.program.handover import Given, Handover, in_order_of


def calls_of_note(layers: int) -> int:
    """Python calls for a graph that takes keys and values of so many layers and returns others."""
    taken = [torch.zeros(2, 3) for _ in range(2 * layers)]
    returned = [torch.ones(2, 4) for _ in range(2 * layers - 1)]
    views = [taken[0].view(3, 2)]
    memory = Memory()
    for tensor in taken:
        memory.given(tensor, None)
    handover = Handover(given={place: Given(0) for place in range(2 * layers - 1)})

    def note() -> None:
        handover.note(memory, taken, [*returned, *views], in_order_of(2), looked_at=False)

    count = calls_of(note)
    assert all(memory.look(tensor) is not None for tensor in returned)
    assert memory.look(views[0]) is None
    assert all(memory.computed(tensor) for tensor in (*taken, *views))
    return count


def test_noting_results_is_linear() -> None:
    few, many = calls_of_note(10), calls_of_note(80)
    assert many <= 8.5 * few
