"""The problems found so far in one adapter checkpoint, and the checks that record them.

All readers of a file share one object, so that all of its problems are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterState
from lorafx.errors import CapacityError, CheckpointError, Setting, UnsupportedAdapterError, some

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Problem(Exception):
    """A part of a file that cannot be placed, and why; `Findings.noting` records it."""


class Unsupported(Problem):
    """It is arithmetic beyond LoRA."""


# A file may have a million names, none of which is in the model.
_MOST_PROBLEMS = 100


class Findings:
    """The checkpoint, the model's places for it, and what does not fit between the two.

    Attributes:
        problems: a line each.
        unsupported: problems that are arithmetic beyond LoRA.
        over_rank: what has a rank over `max_rank`, and the rank.
        settings: those that the lines name.
        no_room: what the banks have no room for, and the setting that makes it, a line each.
        closed: saved paths whose place was not selected, and the line that says so.
        largest: the largest rank that was met.
        compared: something of the file was compared with the base, which may change.
    """

    def __init__(self, state: AdapterState, places: Places, max_rank: int | None) -> None:
        self.state, self.places, self.max_rank = state, places, max_rank
        self.problems: list[str] = []
        self.unsupported: list[str] = []
        self.over_rank: dict[str, int] = {}
        self.settings: list[Setting] = []
        self.no_room: list[str] = []
        self.closed: dict[str, str] = {}
        self.largest = 0
        self.compared = False

    @property
    def config(self) -> PeftConfig:
        return self.state.config

    def raise_problems(self, name: str) -> None:
        """Raise the error that tells all problems of adapter `name`, if there are any.

        Raises:
            UnsupportedAdapterError: one of them is arithmetic beyond LoRA.
            CapacityError: the only problems are a rank over `max_rank`, or no room.
            CheckpointError: anything else.
        """
        problems = [*self.unsupported, *self.problems, *self.no_room]
        if self.over_rank:
            rank = max(self.over_rank.values())
            setting = Setting.asked("max_rank", rank)
            problems.append(
                f"rank {rank} is over max_rank = {self.max_rank} ({listed(list(self.over_rank))});"
                f" {setting}"
            )
            self.settings.append(setting)
        if not problems:
            return
        error: type[CheckpointError | CapacityError] = CapacityError
        if self.unsupported or self.problems:
            error = UnsupportedAdapterError if self.unsupported else CheckpointError
        base = self.config.base_model
        trained = f", trained for {base!r:.200}," if base else ""
        if len(problems) > _MOST_PROBLEMS:
            problems[_MOST_PROBLEMS:] = [f"and {len(problems) - _MOST_PROBLEMS} more"]
        raise error(
            f"adapter {name!r} in {self.state.where}{trained} cannot be loaded:\n"
            + "\n".join(f"  - {problem}" for problem in problems),
            settings=self.settings,
        )

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A block that a `Problem` ends, which is recorded."""
        try:
            yield
        except Unsupported as problem:
            self.unsupported.append(str(problem))
        except Problem as problem:
            self.problems.append(str(problem))

    def equal(self, first: str, second: str) -> bool:
        """Whether two keys hold the same factor."""
        a, b = self.state.tensors[first], self.state.tensors[second]
        alike = a.shape == b.shape and a.dtype == b.dtype and a.dtype in DTYPES
        return alike and torch.equal(a, b)

    def scale(self, label: str, name: str, saved: str, rank: int) -> float | None:
        """s of the module or parameter that the configuration's patterns call `name`, whose factors
        were saved as `saved`; None where the banks do not hold its rank, which is noted.

        Raises:
            Problem: the configuration says another rank.
        """
        configured, given = self.config.rank(name), self.state.scales.get(saved)
        if configured not in (None, rank) and given is None:
            raise Problem(
                f"{label} has rank {rank}, adapter_config.json says {configured} there (r, "
                "rank_pattern), and the scale α/r depends on the rank; correct the configuration"
            )
        self.largest = max(self.largest, rank)
        if self.max_rank is not None and rank > self.max_rank:
            self.over_rank[label] = rank
            return None
        return self.config.scale(name, rank) if given is None else given


def check_sound(key: str, tensor: Tensor) -> None:
    """Raise `Problem` unless a tensor is of finite floating-point numbers."""
    if tensor.dtype not in DTYPES:
        raise Problem(f"{key} is {tensor.dtype}; factors must be floating point")
    unsound = int((~torch.isfinite(tensor)).sum())
    if unsound:
        raise Problem(f"{key} holds {unsound} NaN or infinite values")


def check_shape(key: str, tensor: Tensor, want: tuple[int, int], needs: str) -> None:
    """Raise `Problem`, which says what it `needs`, unless a factor has the shape `want`, none of it
    0."""
    shape = tuple(tensor.shape)
    if shape == want and all(shape):
        return
    if len(shape) != 2 or not all(shape):
        needs += "; a sharded model saved without gathering its shards leaves such factors"
    raise Problem(f"{key} has shape {shape}, {needs}")


def path_label(path: str) -> str:
    """What messages call a module's path."""
    return path or "the root module"


def listed(paths: list[str]) -> str:
    """The first of some paths, and how many there are besides."""
    return some(map(path_label, paths), 8)


def same(saved: Tensor, base: Tensor) -> bool:
    """Whether a saved copy is the model's tensor, up to the rounding of the narrower dtype."""
    if saved.shape != base.shape or not {saved.dtype, base.dtype} <= {*DTYPES}:
        return False
    if base.is_meta:
        return True  # no values to differ from; they are compared when the real model is loaded
    base = base.detach().cpu()
    return torch.equal(saved.to(base.dtype), base) or torch.equal(saved, base.to(saved.dtype))
