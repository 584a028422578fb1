"""The order of the passes over each captured graph, behind those over the model.

DYNAMO_PASSES     Dynamo's graph, in the words of the model's code   →  what AOTAutograd traces
AOT_PASSES        what AOTAutograd makes of it                       →  the captured graph
GRAPH_PASSES      this functional ATen graph                         →  the same with LoRA
LOWERING_PASSES   this graph                                         →  what Inductor makes code of
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from lorafx.config import After, Options
from lorafx.errors import ConfigError, nearest
from lorafx.model_passes import MODEL_PASSES, ModelPass
from lorafx.passes.attend import Attend
from lorafx.passes.attend_dense import AttendDense
from lorafx.passes.check_lookups import CheckLookups
from lorafx.passes.check_order import CheckOrder
from lorafx.passes.copy_returned_inputs import CopyReturnedInputs
from lorafx.passes.detach_results import DetachResults
from lorafx.passes.fold import Fold
from lorafx.passes.fuse import Fuse
from lorafx.passes.gate import Gate
from lorafx.passes.give_out import GiveOut
from lorafx.passes.joint_graph import JointGraph
from lorafx.passes.look_up_slots import LookUpSlots
from lorafx.passes.lower import Lower
from lorafx.passes.match import Match
from lorafx.passes.outline import Outline
from lorafx.passes.pack import Pack
from lorafx.passes.plan import Plan
from lorafx.passes.products import Join, Products
from lorafx.passes.provenance import Provenance
from lorafx.passes.rescale import ReplaceRows, Rescale
from lorafx.passes.unfold import Unfold
from lorafx.passes.write_back import WriteBack
from lorafx.passes.write_in_place import WriteInPlace
from lorafx.program.context import Context


class GraphPass(Protocol):
    """One rewrite of a graph. `run` returns the number of its edits; the driver lints and
    recompiles. Without a `required` pass an answer could be wrong, or a delta lost, silently."""

    @property
    def name(self) -> str: ...

    @property
    def required(self) -> bool: ...

    def run(self, gm: fx.GraphModule, ctx: Context) -> int: ...


DYNAMO_PASSES: tuple[GraphPass, ...] = (
    CheckLookups(),
    DetachResults(),
    Fold(),
)

AOT_PASSES: tuple[GraphPass, ...] = (Unfold(),)

#: `outline` compares layers as they were lowered: those that differ then, by a pinned strategy for
#: example, are not merged.
GRAPH_PASSES: tuple[GraphPass, ...] = (
    LookUpSlots(),
    WriteInPlace(),
    Match(),
    GiveOut(),
    Provenance(),
    Gate(),
    Rescale(),
    ReplaceRows(),
    Attend(),
    AttendDense(),
    Fuse(),
    Pack(),
    Plan(),
    Lower(),
    Products(),
    Join(),
    CheckOrder(),
    Outline(),
    WriteBack(),
)

LOWERING_PASSES: tuple[GraphPass, ...] = (
    JointGraph(),
    CopyReturnedInputs(),
)

_ALL = (*DYNAMO_PASSES, *AOT_PASSES, *GRAPH_PASSES, *LOWERING_PASSES)

#: The places before the first of DYNAMO_PASSES, and before the first of GRAPH_PASSES.
TRACED, CAPTURED = "traced", "captured"


@dataclass(frozen=True)
class UserPass:
    """A pass of the user's, as `Options.passes` has it."""

    name: str
    setting: After
    required: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        edits = self.setting.run(gm, ctx)
        if not isinstance(edits, int):
            raise ConfigError(
                f"the pass {self.name!r} returned {edits!r}; it has to return how many edits it "
                "made to the graph, an int"
            )
        return edits


def way_around(item: GraphPass) -> str:
    """The end of a sentence: what a user can do about a pass that fails."""
    if isinstance(item, UserPass):
        return f"mend it, or leave {item.name!r} out of Options.passes"
    if item in LOWERING_PASSES:
        return 'run the graphs node by node by Options(lowering="reference")'
    if item.required:
        return "leave the modules that this part of the model runs out of target_modules"
    return f"switch the pass off by Options(passes={{{item.name!r}: False}})"


@dataclass(frozen=True)
class Pipeline:
    """The passes over the model, those over each graph with the user's (`dynamo`, `aot`, `graph`
    and `lowering`), and the names of those that are off. `str()` has one line for each."""

    model: tuple[ModelPass, ...]
    dynamo: tuple[GraphPass, ...]
    aot: tuple[GraphPass, ...]
    graph: tuple[GraphPass, ...]
    lowering: tuple[GraphPass, ...]
    off: tuple[str, ...] = ()

    def __str__(self) -> str:
        sections: dict[str, Sequence[ModelPass | GraphPass]] = {
            "over the model, once": self.model,
            "over what Dynamo makes of each call": self.dynamo,
            "over what AOTAutograd makes of that": self.aot,
            "over each captured graph": self.graph,
            "over each graph before code is generated": self.lowering,
        }
        lines: list[str] = []
        for title, passes in sections.items():
            lines += [f"{title}:", *(_line(item.name, _description(item)) for item in passes)]
        return "\n".join([*lines, *(_line(name, "(off)") for name in self.off)])


def pipeline(options: Options | None = None) -> Pipeline:
    """The passes that `lorafx.compile` runs with these options, or with the defaults. Raises
    ConfigError if `options.passes` names an unknown pass, or one that cannot be off."""
    options = Options() if options is None else options
    known = {item.name: item for item in _ALL}
    users = {name: value for name, value in options.passes.items() if isinstance(value, After)}
    for name, value in options.passes.items():
        if isinstance(value, After):
            _check_user_pass(name, value, [*known, *users])
        elif name not in known:
            raise ConfigError(
                f"unknown pass {name!r}{nearest(name, known)}; passes are {', '.join(known)}. A "
                "pass of your own is given as lorafx.After(pass, run)"
            )
        elif known[name].required and not value:
            raise ConfigError(
                f"pass {name!r} cannot be switched off: adapters would be dropped, or answers wrong"
            )
    placed = (
        _placed(TRACED, DYNAMO_PASSES, options, users),
        _placed("", AOT_PASSES, options, users),
        _placed(CAPTURED, GRAPH_PASSES, options, users),
        _placed("", LOWERING_PASSES, options, users),
    )
    there = {item.name for passes in placed for item in passes}
    missing = [name for name in users if name not in there]
    if missing:
        raise ConfigError(f"passes {', '.join(missing)} are placed after one another")
    off = tuple(name for name in known if not options.runs(name))
    return Pipeline(MODEL_PASSES, *placed, off)


def _check_user_pass(name: str, setting: After, known: Sequence[str]) -> None:
    starts = (TRACED, CAPTURED)
    taken = {*starts, *(item.name for item in MODEL_PASSES), *(item.name for item in _ALL)}
    if name in taken:
        raise ConfigError(f"{name!r} is the name of a pass of lorafx; give yours another name")
    if setting.after not in (*starts, *known):
        raise ConfigError(
            f"the pass {name!r} is placed after {setting.after!r}, which is not a pass over "
            f"graphs{nearest(setting.after, known)}; passes are {', '.join((*starts, *known))}"
        )


def _placed(
    start: str, passes: Sequence[GraphPass], options: Options, users: dict[str, After]
) -> tuple[GraphPass, ...]:
    """The passes that are on, each with the user's behind it; `start` is the place before them."""
    placed: list[GraphPass] = list(_passes_behind(start, users))
    for item in passes:
        if options.runs(item.name):
            placed.append(item)
        placed.extend(_passes_behind(item.name, users))
    return tuple(placed)


def _passes_behind(place: str, users: dict[str, After]) -> Iterator[UserPass]:
    for name, setting in users.items():
        if setting.after == place:
            yield UserPass(name, setting)
            yield from _passes_behind(name, users)


def _line(name: str, about: str) -> str:
    return f"  {name:<20}  {about}".rstrip()


def _description(item: ModelPass | GraphPass) -> str:
    text = inspect.getdoc(item.setting.run if isinstance(item, UserPass) else type(item)) or ""
    return text.partition("\n\n")[0].replace("\n", " ")
