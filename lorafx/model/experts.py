"""Routed experts: modules that hold the weights of all experts as 3-D parameters.

    h = act(x W_upᵀ[e])    or   act(gate) ⊙ up of x W_upᵀ[e]
    y = h W_downᵀ[e]            for the experts e that a router chose for each token

A module is of this kind if it has two 3-D parameters over the same number of experts, of which the
second maps back to the input size of the first. Each parameter is a site. transformers' classes
declare their layout by attributes; that of others follows from the shapes.

    experts.gate_up_proj          the parameter of all experts; w13, w13_weight, w2 the same
    experts.gate_proj             the gates of all experts
    experts.3.gate_proj           expert 3's gate, from before the experts were fused
    experts.3.w1, w3, w2          the same in Mixtral's names: gate, up, down
    experts.base_layer            PEFT's wrapper of one parameter inside that of another

A *half* is the part of a parameter's columns that a name covers: all, its gate or its up
projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lorafx.model.module_graph import join
from lorafx.model.weight_formats import Bitsandbytes4Parameter
from lorafx.placements import Placements, is_placed, local
from lorafx.registry import Eligible, lookup

#: How gate and up lie in the columns of the first weight, "" where there is no gate.
Halves = Literal["", "stacked", "interleaved"]


#: How a loop over experts becomes a product that graphs have.
SWITCH = (
    "Call model.set_experts_implementation('lorafx') where the model has that method; otherwise "
    "apply transformers.integrations.use_experts_implementation to the class before the model is "
    "built, and set config._experts_implementation = 'grouped_mm'"
)
#: Why a graph of a loop over experts carries no LoRA, and what to do.
LOOP = (
    "a Python loop over experts is not captured. Use Options(start='eager'), which follows it. "
    f"{SWITCH}"
)


@dataclass(frozen=True)
class ExpertWeight:
    """One 3-D parameter of an experts module: (E, N, K), or (E, K, N) if `transposed`; `down` for
    the second of the two, `halves` for gate and up in its columns, `placed` for a DTensor."""

    name: str
    experts: int
    in_features: int
    out_features: int
    transposed: bool
    halves: Halves
    down: bool
    placed: bool = False

    def eligible(self, entry: Eligible | None) -> Eligible:
        """A registry entry of the parameter; `entry` is that of its module's class."""
        sizes = self.in_features, self.out_features
        sharding = None if entry is None else entry.weight_shardings.get(self.name)
        if self.placed:
            slices = 2 if self.halves == "stacked" else 1
            sharding = Placements(self.name, self.transposed, slices)
        return Eligible(
            nn.Module,
            "experts",
            lambda _: sizes,
            self.name,
            self.transposed,
            sharding=sharding,
            rank_shards=None if entry is None else entry.rank_shards,
        )

    def path(self, module_path: str) -> str:
        return join(module_path, self.name)


def expert_weights(
    module: nn.Module, *, whole: bool = False
) -> tuple[ExpertWeight, ExpertWeight] | None:
    """Both weights of routed experts, up (or gate and up) first; None for other modules. `whole`:
    with the sizes of DTensors, of which this rank may hold a part."""
    entry = lookup(module)
    if entry is not None and entry.kind != "experts":
        return None
    stacks = _stacked_parameters(module)
    placed = any(is_placed(parameter) for _, parameter in stacks)
    if not whole:
        stacks = [(name, local(parameter)) for name, parameter in stacks]
    if len(stacks) != 2 or stacks[0][1].shape[0] != stacks[1][1].shape[0]:
        return None
    declared = getattr(module, "is_transposed", None)
    forms = (declared,) if isinstance(declared, bool) else (False, True)
    fitting = [
        pair
        for transposed in forms
        for first, second in (stacks, stacks[::-1])
        if (pair := _matching_pair(module, first, second, transposed)) is not None
    ]
    if not fitting:
        return None
    up, down = fitting[0]
    return replace(up, placed=placed), replace(down, placed=placed)


def saved_weights(module: nn.Module) -> tuple[ExpertWeight, ...] | None:
    """`expert_weights` with the sizes of checkpoints, of which this rank may hold a part."""
    entry, parameters = lookup(module), expert_weights(module, whole=True)
    if entry is None or parameters is None:
        return parameters
    weights = []
    for weight in parameters:
        sharding = entry.weight_shardings.get(weight.name)
        if sharding is not None:
            k, sizes = sharding.saved_sizes(module)
            weight = replace(weight, in_features=k, out_features=sum(sizes))
        weights.append(weight)
    return tuple(weights)


def unlike_experts(module: nn.Module) -> str | None:
    """Why a module with 3-D parameters is not one of routed experts; None if it has none."""
    stacks = _stacked_parameters(module)
    if not stacks:
        return None
    shapes = ", ".join(f"{name} {tuple(parameter.shape)}" for name, parameter in stacks)
    return (
        f"it holds 3-D parameters ({shapes}), and 3-D parameters carry LoRA only as the "
        "weights of routed experts: two of them, for the same number of experts, where the "
        "second maps back to the input size of the first"
    )


def _stacked_parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    made: Any = module.parametrizations if is_parametrized(module) else ()
    four_bits = Bitsandbytes4Parameter()
    stored = ((n, four_bits.described(module, n)) for n in made if four_bits.holds(module, n))
    return [
        (name, parameter)
        for name, parameter in (*module._parameters.items(), *stored)
        if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point()
    ]


def is_switched(module: nn.Module) -> bool:
    """Whether transformers' switch chooses the forward of the module."""
    return isinstance(getattr(module, "has_gate", None), bool) and hasattr(module, "config")


def implementation(config: Any) -> Any:
    """What the switch is at: "eager", "grouped_mm", ..."""
    return getattr(config, "_experts_implementation", None)


def loops(module: nn.Module) -> bool:
    """Whether transformers' switch makes the module run one expert after another in Python."""
    return is_switched(module) and implementation(module.config) == "eager"


def by_lorafx(module: nn.Module) -> bool:
    """Whether transformers' switch makes `lorafx.layers.experts` the forward of the module."""
    return implementation(getattr(module, "config", None)) == "lorafx"


def _matching_pair(
    module: nn.Module, up: tuple[str, Tensor], down: tuple[str, Tensor], transposed: bool
) -> tuple[ExpertWeight, ExpertWeight] | None:
    """Both weights if `down` maps the output of `up`, gated or not, back to its input size."""
    (experts, *up_shape), (_, *down_shape) = up[1].shape, down[1].shape
    hidden, width = up_shape if transposed else up_shape[::-1]
    inner, out = down_shape if transposed else down_shape[::-1]
    if out != hidden or width not in (inner, 2 * inner):
        return None
    halves: Halves = ""
    if width == 2 * inner:
        halves = "stacked" if getattr(module, "is_concatenated", True) else "interleaved"
    return (
        ExpertWeight(up[0], experts, hidden, width, transposed, halves, down=False),
        ExpertWeight(down[0], experts, inner, out, transposed, "", down=True),
    )


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
    """A name below a module of experts: its `weight`, or None; its `expert`, None for all; whether
    it is the parameter's `own` name; `wrong`, the reason why it has no place, or ""."""

    weight: ExpertWeight | None
    half: Half
    expert: int | None
    own: bool = False
    wrong: str = ""


def meaning(weights: Sequence[ExpertWeight], names: Sequence[str]) -> ExpertMeaning | None:
    """The meaning of "3.gate_proj" or "gate_up_proj", split at dots; None if no projection."""
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
    return path.removesuffix(f".{NESTED}")


def covers(weight: ExpertWeight, name: str) -> Half | None:
    """The half of `weight` that a projection's name covers; None if it names another parameter."""
    down, half = PROJECTIONS[name]
    if down != weight.down:
        return None
    if not weight.halves and not weight.down:
        return "all" if half in ("all", "up") or name == "w1" else None
    return half


def overlapping(half: Half) -> tuple[Half, ...]:
    return ("all", "gate", "up") if half == "all" else ("all", half)


def folded(entry: str) -> str:
    """A target's entry with an expert's index as 0, and without PEFT's nesting."""
    return _INDEXED.sub(r"\g<1>0.\2", unnested(entry))


def checkpoint_names(weight: ExpertWeight, module_path: str, expert: int = 0) -> Iterator[str]:
    """Paths that `weight`, or one expert's part of it, may have in a checkpoint."""
    for name in PROJECTIONS:
        if covers(weight, name) is not None:
            yield f"{module_path}.{expert}.{name}".lstrip(".")
            yield f"{module_path}.{name}".lstrip(".")
