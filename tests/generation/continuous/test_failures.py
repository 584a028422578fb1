"""Which requests of a step fail, told apart by parts of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from lorafx import MatchError
from lorafx.generation.continuous.failures import in_parts

ADAPTERS = [3, None, 1, 3, None, 2, 1, 1]


def parts_of(
    adapters: Sequence[int | None], fails: Callable[[Sequence[int]], Exception | None]
) -> tuple[list[Sequence[int]], dict[int, Exception], int]:
    """The parts that are served, why others fail, and how many were tried."""
    tried = 0

    def run(part: Sequence[int]) -> int:
        nonlocal tried
        tried += 1
        error = fails(part)
        if error is not None:
            raise error
        return sum(part)

    whole = fails(range(len(adapters)))
    assert whole is not None
    served, failed = in_parts(adapters, run, whole)
    assert all(result == sum(part) for part, result in served)
    places = [place for part, _ in served for place in part]
    assert sorted([*places, *failed]) == [*range(len(adapters))]  # each once
    return [part for part, _ in served], failed, tried


def test_an_adapter_that_is_refused() -> None:
    """All that it has in the step, without a try for each request."""
    refused = MatchError("refused")
    _, failed, tried = parts_of(
        ADAPTERS, lambda part: refused if any(ADAPTERS[place] == 1 for place in part) else None
    )
    assert failed == dict.fromkeys((2, 6, 7), refused)
    assert tried <= 6


def test_requests_for_which_the_model_raises() -> None:
    _, failed, _ = parts_of(ADAPTERS, lambda part: IndexError() if {0, 6} & {*part} else None)
    assert failed.keys() == {0, 6}


def test_a_mix_that_is_refused_is_served_by_turns() -> None:
    def mixed(part: Sequence[int]) -> Exception | None:
        return MatchError("mix") if {1, 2} <= {ADAPTERS[place] for place in part} else None

    served, failed, _ = parts_of(ADAPTERS, mixed)
    assert not failed
    assert len(served) >= 2


def test_a_step_of_one_adapter_is_not_tried_again() -> None:
    _, failed, tried = parts_of([1, 1, 1], lambda part: MatchError("refused"))
    assert (len(failed), tried) == (3, 0)


def test_errors_of_the_device_are_everybody_s() -> None:
    def lost(part: Sequence[int]) -> Exception:
        return IndexError() if len(part) == len(ADAPTERS) else torch.OutOfMemoryError()

    with pytest.raises(torch.OutOfMemoryError):
        parts_of(ADAPTERS, lost)
