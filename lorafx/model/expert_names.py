"""What checkpoints call the projections of routed experts.

    experts.gate_up_proj          the parameter of all experts; w13, w2 the same
    experts.gate_proj             the gates of all experts
    experts.3.gate_proj           expert 3's gate, from before the experts were fused
    experts.3.w1, w3, w2          the same in Mixtral's words: gate, up, down
    experts.base_layer            PEFT's wrapper of one parameter inside that of another

A *half* is what a name covers of a parameter's columns: all of it, its gate or its up projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from lorafx.model.experts import ExpertWeight

Half = Literal["all", "gate", "up"]
#: A half of the columns of one expert, of all for None.
Columns = tuple[Half, int | None]

#: Name of one expert's projection -> (is it the down projection, what it covers of its parameter).
PROJECTIONS: Mapping[str, tuple[bool, Half]] = {
    "gate_proj": (False, "gate"),
    "w1": (False, "gate"),
    "up_proj": (False, "up"),
    "w3": (False, "up"),
    "gate_up_proj": (False, "all"),
    "w13": (False, "all"),
    "down_proj": (True, "all"),
    "w2": (True, "all"),
}
_INDEXED = re.compile(r"^(?P<module>.*?)\.?(?P<expert>[0-9]{1,9})\.(?P<name>[^.]+)$")
_NESTED = ".base_layer"


class ExpertName(NamedTuple):
    """One expert's projection: path of the experts module, index, name."""

    module: str
    expert: int
    name: str


def unnested(path: str) -> str:
    """`path` without PEFT's wrapper inside of another."""
    return path.removesuffix(_NESTED)


def parse(path: str) -> ExpertName | None:
    """`path` as the projection of one expert, or None where it cannot be one."""
    found = _INDEXED.match(path)
    if found is None or found["name"] not in PROJECTIONS:
        return None
    return ExpertName(found["module"], int(found["expert"]), found["name"])


def covers(weight: ExpertWeight, name: str) -> Half | None:
    """What a projection's name covers of `weight`; None where it is another parameter's."""
    down, half = PROJECTIONS[name]
    if down != weight.down:
        return None
    if not weight.halves and not weight.down:
        return "all" if half in ("all", "up") else None
    return half


def overlapping(half: Half) -> tuple[Half, ...]:
    """The halves that have columns in common with this one."""
    return ("all", "gate", "up") if half == "all" else ("all", half)


def folded(entry: str) -> str:
    """A target's entry with the expert's index, if it has one, as 0, and without PEFT's nesting."""
    entry = unnested(entry)
    found = parse(entry)
    if found is None:
        return entry
    return f"{found.module}.0.{found.name}" if found.module else f"0.{found.name}"


def own_names(weight: ExpertWeight, module_path: str, expert: int = 0) -> Iterator[str]:
    """The paths that one expert's part of `weight`, or that of all, may have in a checkpoint."""
    for name in PROJECTIONS:
        if covers(weight, name) is not None:
            yield f"{module_path}.{expert}.{name}".lstrip(".")
            yield f"{module_path}.{name}".lstrip(".")
