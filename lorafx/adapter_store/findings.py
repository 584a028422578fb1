"""The problems found so far in one adapter checkpoint, and the checks that record them.

The readers of its dense factors (`reading`) and of those of routed experts (`expert_reading`) share
one object, so that all problems of a file are reported at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterState
from lorafx.errors import CapacityError, CheckpointError, Setting, UnsupportedAdapterError, some

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

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
        if self.unsupported:
            error: type[CheckpointError | CapacityError] = UnsupportedAdapterError
        else:
            error = CheckpointError if self.problems else CapacityError
        base = self.config.base_model
        trained = f", trained for {base!r:.200}," if base else ""
        if len(problems) > _MOST_PROBLEMS:
            left = len(problems) - _MOST_PROBLEMS
            problems[_MOST_PROBLEMS:] = [f"and {left} more"]
        raise error(
            f"adapter {name!r} in {self.state.where}{trained} cannot be loaded:\n"
            + "\n".join(f"  - {problem}" for problem in problems),
            settings=self.settings,
        )

    def equal(self, first: str, second: str) -> bool:
        """Whether two keys hold the same factor."""
        a, b = self.state.tensors[first], self.state.tensors[second]
        alike = a.shape == b.shape and a.dtype == b.dtype and a.dtype in DTYPES
        return alike and torch.equal(a, b)

    def sound(self, key: str, tensor: Tensor) -> bool:
        """Whether a factor is of finite floating-point numbers; a problem is noted where not."""
        if tensor.dtype not in DTYPES:
            self.problems.append(f"{key} is {tensor.dtype}; factors must be floating point")
            return False
        if not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            self.problems.append(f"{key} holds {count} NaN or infinite values")
            return False
        return True

    def shaped(self, key: str, tensor: Tensor, want: tuple[int, int], needs: str) -> bool:
        """Whether a factor has the shape `want`, none of it 0; where not, a problem says what it
        `needs`."""
        shape = tuple(tensor.shape)
        if shape == want and all(shape):
            return True
        if len(shape) != 2 or not all(shape):
            needs += "; a sharded model saved without gathering its shards leaves such factors"
        self.problems.append(f"{key} has shape {shape}, {needs}")
        return False

    def rank_fits(self, label: str, name: str, saved: str, rank: int) -> bool:
        """Whether `rank` is the configuration's for `name` and the banks hold it; a problem is
        noted where not. `saved` is the path under which the factors were saved."""
        said = self.config.rank(name)
        if said not in (None, rank) and saved not in self.state.scales:
            self.problems.append(
                f"{label} has rank {rank}, adapter_config.json says {said} there (r, "
                "rank_pattern), and the scale α/r depends on the rank; correct the "
                "configuration"
            )
            return False
        self.largest = max(self.largest, rank)
        if self.max_rank is not None and rank > self.max_rank:
            self.over_rank[label] = rank
            return False
        return True

    def scale(self, name: str, saved: str, rank: int) -> float:
        """s of the module or parameter that the configuration's patterns call `name`."""
        return self.state.scales.get(saved, self.config.scale(name, rank))


def path_label(path: str) -> str:
    """What messages call a module's path."""
    return path or "the root module"


def listed(paths: list[str], most: int = 8) -> str:
    """The first of some paths, and how many there are besides."""
    return some(map(path_label, paths), most)
