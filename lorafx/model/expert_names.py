"""What checkpoints call the projections of routed experts.

    experts.gate_up_proj          the parameter of all experts; w13, w13_weight, w2 the same
    experts.gate_proj             the gates of all experts
    experts.3.gate_proj           expert 3's gate, from before the experts were fused
    experts.3.w1, w3, w2          the same in Mixtral's words: gate, up, down
    experts.base_layer            PEFT's wrapper of one parameter inside that of another

A *half* is what a name covers of a parameter's columns: all of it, its gate or its up projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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
_INDEX = re.compile("[0-9]{1,9}")
_INDEXED = re.compile(rf"(^|\.){_INDEX.pattern}\.({'|'.join(PROJECTIONS)})$")
#: PEFT's wrapper inside of another.
NESTED = "base_layer"


class ExpertMeaning(NamedTuple):
    """What a name below a module of routed experts means.

    Attributes:
        weight: the parameter; None where the module has no such projection.
        half: what is meant of its columns.
        expert: the index, None for all.
        own: whether it is the parameter's own name.
        wrong: why nothing can be placed by this name, "" where it can.
    """

    weight: ExpertWeight | None
    half: Half
    expert: int | None
    own: bool = False
    wrong: str = ""


def meaning(weights: Sequence[ExpertWeight], names: Sequence[str]) -> ExpertMeaning | None:
    """What "3.gate_proj" or "gate_up_proj", split at its dots, means below a module of experts that
    has these two weights; None where it is no projection of theirs."""
    expert = int(names[0]) if len(names) == 2 and _INDEX.fullmatch(names[0]) else None
    if len(names) != (1 if expert is None else 2):
        return None
    name = names[-1]
    for weight in weights:
        if name == weight.name:
            return ExpertMeaning(weight, "all", expert, own=True)
    name = name.removesuffix("_weight")
    if name not in PROJECTIONS:
        return None
    for weight in weights:
        half = covers(weight, name)
        if half is None:
            continue
        unclear = half == "all" and weight.halves == "interleaved"
        wrong = (
            f"gate and up of {weight.name} are interleaved, but {name} may mean interleaved "
            f"or consecutive halves; give them as {weight.name}, or as w1 and w3"
        )
        return ExpertMeaning(weight, half, expert, wrong=wrong if unclear else "")
    wrong = f"the experts here have no {name}: {', '.join(weight.name for weight in weights)}"
    return ExpertMeaning(None, "all", expert, wrong=wrong)


def unnested(path: str) -> str:
    """`path` without PEFT's wrapper inside of another."""
    return path.removesuffix(f".{NESTED}")


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
    return _INDEXED.sub(r"\g<1>0.\2", unnested(entry))


def own_names(weight: ExpertWeight, module_path: str, expert: int = 0) -> Iterator[str]:
    """The paths that one expert's part of `weight`, or that of all, may have in a checkpoint."""
    for name in PROJECTIONS:
        if covers(weight, name) is not None:
            yield f"{module_path}.{expert}.{name}".lstrip(".")
            yield f"{module_path}.{name}".lstrip(".")
