"""Names of adapters in calls: a name, the base's name, or weights by name for a sum.

"sql"                            the adapter
{"sql": 0.5}                     the adapter at half its scale
{"sql": 0.7, "style": 0.3}       the sum of two
Arrow(["sql", "style"])          those that each module chooses for a token
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

from lorafx.errors import ConfigError

BASE = "__base__"
#: The adapters of a token at most: each is computed for all tokens.
MOST_GATES = 16
#: Of which there are too many to count each.
SUMS = "__sums__"

#: What a request may name.
AdapterName: TypeAlias = "str | Mapping[str, float] | None"


class Mixture(str):
    """The name of a sum of adapters, "0.7·sql + 0.3·style"; `weights` are sorted by name."""

    weights: tuple[tuple[str, float], ...]
    _key: tuple[Any, ...]

    def __new__(cls, weights: Mapping[str, float]) -> Mixture:
        ordered = tuple(sorted(weights.items()))
        text = super().__new__(cls, " + ".join(f"{weight:g}·{name}" for name, weight in ordered))
        text.weights = ordered
        text._key = (ordered,)
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mixture) and self._key == other._key

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._key)


class Arrow(Mixture):
    """A name for rows whose adapters each module chooses, token by token, as PEFT's Arrow does.

        y = W x + Σ_j w_j Δ_j(x)        w = softmax over the `top_k` largest |v_jᵀ x| / temperature

    v_j is the first right singular vector of the module's B_j A_j. It goes wherever a call takes a
    name, and needs no training.

    Args:
        adapters: 16 loaded adapters at most, all with plain LoRA on the same linears.
        top_k: how many of them a token gets.
        temperature: 1e-37 to 1e37; a lower one makes the weights of the largest larger.
        general: loaded adapters whose mean A and mean B are subtracted from those of each of the
            others (general knowledge subtraction).

    Raises:
        ConfigError: an argument is none of these.
    """

    top_k: int
    temperature: float
    general: tuple[str, ...]

    def __new__(
        cls,
        adapters: Sequence[str],
        top_k: int = 3,
        temperature: float = 1.0,
        general: Sequence[str] = (),
    ) -> Arrow:
        for names in (adapters, general):
            if isinstance(names, str) or not all(map(_is_plain, names)):
                raise ConfigError(f"Arrow takes lists of names of adapters, got {names!r:.80}")
        if not 0 < len(adapters) <= MOST_GATES or len({*adapters, *general}) != len(
            [*adapters, *general]
        ):
            raise ConfigError(
                f"Arrow takes 1 to {MOST_GATES} different adapters, got {list(adapters)!r:.80}, "
                f"and others as general ones, got {list(general)!r:.80}"
            )
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 < top_k <= len(adapters):
            raise ConfigError(
                f"Arrow has top_k={top_k!r}; give a number of its adapters, 1 to {len(adapters)}"
            )
        if not 1e-37 < as_number(temperature) < 1e37:  # 0 and inf in float32 would be NaN
            raise ConfigError(
                f"Arrow has temperature={temperature!r}; give a number above 0 (1e-37 to 1e37)"
            )
        less = f" less {', '.join(general)}" if general else ""
        chosen = f"{top_k} of {', '.join(adapters)}{less} at {temperature:g}"
        text = str.__new__(cls, f"arrow({chosen})")
        text.weights = tuple((name, 1.0) for name in (*adapters, *general))
        text.top_k, text.temperature, text.general = top_k, float(temperature), tuple(general)
        text._key = cls, text.weights, text.top_k, text.temperature, text.general
        return text

    @property
    def experts(self) -> tuple[str, ...]:
        """The adapters to choose from."""
        names = members(self)[: len(self.weights) - len(self.general)]
        return tuple(Purified(name, self.general) for name in names) if self.general else names

    def __getnewargs__(self) -> tuple[Any, ...]:
        names = members(self)[: len(self.weights) - len(self.general)]
        return names, self.top_k, self.temperature, self.general


class Purified(Mixture):
    """An adapter whose A and B have the mean of the `general` ones' subtracted."""

    def __new__(cls, name: str, general: Sequence[str]) -> Purified:
        text = str.__new__(cls, f"{name} less {', '.join(general)}")
        text.weights = tuple((n, 1.0) for n in (name, *general))
        text._key = cls, text.weights
        return text


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name not in ("", BASE) and not isinstance(name, Mixture)


def members(name: str) -> tuple[str, ...]:
    """The adapters that a name stands for."""
    return tuple(member for member, _ in name.weights) if isinstance(name, Mixture) else (name,)


def with_experts(names: Iterable[str]) -> dict[str, None]:
    """These names, and those that the routes among them choose from."""
    routes = ((name, name.experts if isinstance(name, Arrow) else ()) for name in names)
    return {name: None for route, experts in routes for name in (route, *experts)}


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
    return named_sum(weights)


def named_sum(weights: Mapping[str, float]) -> str | None:
    """The name of a sum: that of the adapter for a single one at weight 1, None without any."""
    if list(weights.values()) == [1.0]:
        return next(iter(weights))
    return Mixture(weights) if weights else None


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
    if not isinstance(name, str) or not name or name in (BASE, SUMS) or isinstance(name, Mixture):
        raise ConfigError(
            f"an adapter's name is a non-empty string other than {BASE!r} and {SUMS!r}, and no "
            f"sum or route, got {name!r}"
        )
