"""The problems of a file: all are found before anything is raised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: The dtypes of factors, once float8 has become float32.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Problem(Exception):
    """Why a part of a file cannot be used; `Problems.noting` records it."""


class Unsupported(Problem):
    """A problem because of arithmetic beyond what is served."""


class Problems:
    """Attributes: `problems` and `unsupported`, messages."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.unsupported: list[str] = []

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A block that records a `Problem`, which ends it."""
        try:
            yield
        except Unsupported as problem:
            self.unsupported.append(str(problem))
        except Problem as problem:
            self.problems.append(str(problem))


def finite_number(tensor: Tensor) -> float | None:
    """The number that a tensor of one finite number holds; None for any other tensor."""
    value = float(tensor.item()) if tensor.numel() == 1 and not tensor.is_complex() else None
    return value if value is not None and abs(value) < float("inf") else None
