"""The problems found in an adapter checkpoint, and the checks that find them.

All readers of a file share one `Findings`, so that all problems are reported at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import FactorKey, without_prefix
from lorafx.adapter_store.places import TARGETS, Places
from lorafx.adapter_store.problems import DTYPES, Problem, Problems
from lorafx.adapter_store.saved import AdapterState
from lorafx.adapter_store.untrusted_files import unsound
from lorafx.errors import (
    CapacityError,
    CheckpointError,
    Setting,
    UnsupportedAdapterError,
    itemised,
    some,
    way_out_by,
)
from lorafx.placements import local, share


class Findings(Problems):
    """The checkpoint, the model's places for it, and what does not fit.

    Attributes:
        settings: what messages name.
        no_room: paths of modules whose weight may not be replaced -> how many rows are to be, None
            for all.
        unavailable: saved paths of places that cannot have factors, with the reasons.
    """

    def __init__(self, state: AdapterState, places: Places, max_rank: int | None) -> None:
        super().__init__()
        self.state, self.places, self.max_rank = state, places, max_rank
        self.over_rank: dict[str, int] = {}
        self.no_room: dict[str, int | None] = {}
        self.settings: list[Setting] = []
        self.unavailable: dict[str, str] = {}
        self.largest = 0

    @property
    def config(self) -> PeftConfig:
        return self.state.config

    def raise_problems(self, name: str) -> None:
        """Raise all problems as one error, a CapacityError if all are of ranks or room."""
        problems = [*self.unsupported, *self.problems]
        whole = [path for path, rows in self.no_room.items() if rows is None]
        partly = {path: rows for path, rows in self.no_room.items() if rows is not None}
        for setting, room in {"modules_to_save": whole, "trainable_tokens": partly}.items():
            if room:
                needed = way_out_by(setting, room, given=True)
                self.settings.append(needed)
                what = f"weights of the adapter's own at {listed([*room])}"
                problems.append(f"there is no room for {what}; {needed}")
        if self.over_rank:
            rank = max(self.over_rank.values())
            needed = way_out_by("max_rank", rank)
            self.settings.append(needed)
            problems.append(
                f"rank {rank} is over max_rank = {self.max_rank} ({listed(list(self.over_rank))});"
                f" {needed}"
            )
        if not problems:
            return
        error: type[CheckpointError | CapacityError] = CapacityError
        if self.unsupported or self.problems:
            error = UnsupportedAdapterError if self.unsupported else CheckpointError
        base = self.config.base_model
        trained = f", trained for {base!r:.200}," if base else ""
        head = f"adapter {name!r} in {self.state.where}{trained} cannot be loaded"
        raise error(itemised(head, problems)).naming(TARGETS, *self.settings)

    def check_same(self, factor: FactorKey, first: str, label: str) -> None:
        """Raise `Problem` unless the tensor equals that of `first`, the first key for its place."""
        a, b = self.state.tensors[factor.key], self.state.tensors[first]
        comparable = a.shape == b.shape and a.dtype == b.dtype and a.dtype in DTYPES
        if factor.key != first and not (comparable and torch.equal(a, b)):
            raise Problem(
                f"{factor.key} and {first} are both {factor.factor} of {label} and differ; keep one"
            )

    def original_path(self, saved: str) -> str:
        """The path in the file of the factors at `saved`, before a `key_mapping`. Patterns match
        names that are made from it."""
        return self.state.paths.get(without_prefix(saved), saved)

    def scale(self, label: str, name: str, saved: str, rank: int) -> float | None:
        """s of the module that patterns call `name`, saved as `saved`; None for a rank over
        `max_rank`. Raises `Problem` if `rank` is not the configured rank."""
        configured, scale = self.config.rank(name), self.state.scales.get(saved)
        if configured not in (None, rank) and scale is None:
            raise Problem(
                f"{label} has rank {rank}, adapter_config.json says {configured} there (r, "
                "rank_pattern), and the scale α/r depends on the rank; correct the configuration"
            )
        self.largest = max(self.largest, rank)
        if self.max_rank is not None and rank > self.max_rank:
            self.over_rank[label] = rank
            return None
        return self.config.scale(name, rank) if scale is None else scale


def check_sound(key: str, tensor: Tensor) -> None:
    """Raise `Problem` unless `tensor` holds finite floating-point numbers."""
    if tensor.dtype not in DTYPES:
        raise Problem(
            f"{key} is {tensor.dtype}; factors are read in float16, bfloat16, float32, float64, "
            "float8_e4m3fn and float8_e5m2"
        )
    if count := unsound(tensor):
        raise Problem(f"{key} holds {count} NaN or infinite values")


def check_shape(key: str, tensor: Tensor, expected: tuple[int, int], needs: str) -> None:
    """Raise `Problem` with the text `needs` unless a factor has the non-empty shape `expected`."""
    shape = tuple(tensor.shape)
    if shape == expected and all(shape):
        return
    if len(shape) != 2 or not all(shape):
        needs += "; a sharded model saved without gathering its shards leaves such factors"
    raise Problem(f"{key} has shape {shape}, {needs}")


def path_label(path: str) -> str:
    """A module's path in messages."""
    return path or "the root module"


def listed(paths: list[str]) -> str:
    """The first of these paths, and the number of the others."""
    return some(map(path_label, paths), 8)


def equal(saved: Tensor, base: Tensor) -> bool:
    """Whether a saved copy equals the model's tensor, up to rounding of the narrower dtype."""
    if saved.shape != base.shape or not {saved.dtype, base.dtype} <= {*DTYPES}:
        return False
    if base.is_meta:
        return True  # there are no numbers to compare with
    saved, base = share(saved, base), local(base.detach()).cpu()
    return torch.equal(saved.to(base.dtype), base) or torch.equal(saved, base.to(saved.dtype))
