"""An interrupted call leaves torch's dispatcher as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from interrupting import every_place
from torch._C import _len_torch_dispatch_stack

from lorafx.eager.following import Following, unfollowed
from lorafx.torch_internals.graph_parts import _push_on_torch_dispatch_stack


@pytest.fixture(autouse=True)
def _left_over() -> Iterator[None]:
    """What a failure leaves stays in this test."""
    yield
    while _len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)


def plain() -> None:
    Following().run(lambda: torch.ones(2) + 1)


def nested() -> None:
    Following().run(lambda: Following().run(lambda: torch.ones(2) + 1))


def graph_of() -> None:
    def graph(mode: Following | None) -> None:
        assert mode is not None
        mode.in_graph(lambda: torch.ones(2) + 1)

    Following().run(lambda: unfollowed(graph))


@pytest.mark.parametrize("action", [nested, graph_of])
def test_an_interrupt_anywhere_leaves_nothing_on_the_stack(action: Callable[[], None]) -> None:
    places = 0
    for _, error in every_place(action):
        places += 1
        assert isinstance(error, KeyboardInterrupt)
        assert _len_torch_dispatch_stack() == 0
    assert places > 10


def test_what_has_ended_is_taken_off() -> None:
    """As two interrupts leave it."""
    left = Following()
    _push_on_torch_dispatch_stack(left)
    left.over = True
    plain()
    assert _len_torch_dispatch_stack() == 0
