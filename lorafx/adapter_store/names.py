"""Names of adapters in calls: a name, the base's name, or weights by name for a sum.

"sql"                            the adapter
{"sql": 0.5}                     the adapter at half its scale
{"sql": 0.7, "style": 0.3}       the sum of two
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, TypeAlias

from lorafx.errors import ConfigError

BASE = "__base__"
#: Of which there are too many to count each.
SUMS = "__sums__"

#: What a request may name.
AdapterName: TypeAlias = "str | Mapping[str, float] | None"


class Mixture(str):
    """The name of a sum of adapters, "0.7·sql + 0.3·style"; `weights` are sorted by name."""

    weights: tuple[tuple[str, float], ...]

    def __new__(cls, weights: Mapping[str, float]) -> Mixture:
        ordered = tuple(sorted(weights.items()))
        text = super().__new__(cls, " + ".join(f"{weight:g}·{name}" for name, weight in ordered))
        text.weights = ordered
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mixture) and self.weights == other.weights

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.weights)


def members(name: str) -> tuple[str, ...]:
    """The adapters that a name stands for."""
    return tuple(member for member, _ in name.weights) if isinstance(name, Mixture) else (name,)


def one_name(value: Any, where: str) -> str | None:
    """The name that `value` (a name, None for the base, or weights by name) stands for; that of the
    adapter for a single one at weight 1. ConfigError messages begin with `where`."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where} is {value!r}; give a name, a mapping of names to weights, or None for the "
            "base model"
        )
    if not value:
        raise ConfigError(
            f"{where} is an empty mapping; give weights by name, or None for the base model"
        )
    weights: dict[str, float] = {}
    for name, weight in value.items():
        if name is None or name == BASE:
            raise ConfigError(
                f"{where} gives the base model a weight; it is part of every result, so name "
                "adapters alone"
            )
        if not isinstance(name, str) or not name or isinstance(name, Mixture):
            raise ConfigError(f"{where} has {name!r} among its names; give names of adapters")
        weights[name] = as_number(weight)
        if not math.isfinite(weights[name]):
            raise ConfigError(
                f"{where} gives {name!r} the weight {weight!r:.80}; a weight is a finite number"
            )
    if list(weights.values()) == [1.0]:
        return next(iter(weights))
    return Mixture(weights)


def as_number(weight: object) -> float:
    """A weight as a float; not a number if it is none."""
    if not isinstance(weight, Real) or isinstance(weight, bool):
        return math.nan
    try:
        return float(weight)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def adapters_among(names: Iterable[str | None]) -> list[str]:
    """The distinct `names` that are not the base."""
    return list(dict.fromkeys(name for name in names if name is not None and name != BASE))


def check_name(name: object) -> None:
    """Raise ConfigError unless `name` can name an adapter."""
    if not isinstance(name, str) or not name or name in (BASE, SUMS):
        raise ConfigError(
            f"an adapter's name is a non-empty string other than {BASE!r} and {SUMS!r}, got "
            f"{name!r}"
        )
