"""Which families run through Inductor: those that together hold the most distinct operators.

    chosen = greedy cover: take the family with the most operators that are not covered yet

until all are covered; then cover them once more, until the share is reached. Families that serve
nothing but one operator twice are the last to be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Key = tuple[str, str]  # kind, model type


def chosen(reports: Iterable[Mapping[str, Any]], share: float = 1 / 3) -> list[Key]:
    """That share of the families that are ok, in the order in which they are chosen.

    Deterministic: ties go to the family that comes first by kind and name.
    """
    operators = {
        (r["kind"], r["type"]): frozenset(r["operators"]) for r in reports if r["outcome"] == "ok"
    }
    left = sorted(operators)
    wanted = math.ceil(share * len(left))
    found: list[Key] = []
    missing: set[str] = set()
    while len(found) < wanted:
        best = max(left, key=lambda key: len(operators[key] & missing))
        if not operators[best] & missing:  # all are covered, or nobody holds what is missing
            missing = set().union(*(operators[key] for key in left))
            best = max(left, key=lambda key: len(operators[key] & missing))
        found.append(best)
        left.remove(best)
        missing -= operators[best]
    return found
