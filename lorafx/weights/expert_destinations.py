"""Where checkpoint tensors of routed experts go.

    experts.3.gate_proj.weight    W_up[3, gate rows, :]      w1, w3, w2 the same in Mixtral's words
    experts.gate_proj             W_up[:, gate rows, :]      the gates of all experts
    experts.gate_up_proj          W_up                       w13, w13_weight; either orientation
    moe.gate_proj.weight          the same without the name of the module of experts

Names and halves are those of adapters (lorafx.model.experts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lorafx.errors import CheckpointError
from lorafx.model.experts import (
    PROJECTIONS,
    ExpertMeaning,
    ExpertWeight,
    Half,
    expert_weights,
    meaning,
)
from lorafx.model.module_graph import join
from lorafx.model.saved_names import Walked
from lorafx.weights.loadable_layer import LoadableLayer
from lorafx.weights.weight_places import Box, Cut, Destination, Shard, Target, WeightNames, no_place

_SHARDS: dict[Half, str] = {"gate": "w1", "up": "w3"}


class ExpertDestinations:
    def __init__(self, names: WeightNames) -> None:
        self._names = names
        self._weights: dict[int, tuple[ExpertWeight, ...]] = {}

    def destinations(self, walked: Walked) -> Iterator[Destination]:
        """Possible places of a name that leads to a module of experts."""
        for owner in self._owners(walked):
            names, kind = _named(owner.rest)
            meant = meaning(self._of(owner.module), names)
            if meant is None or meant.weight is None:
                continue
            target = self._target(owner.module, meant.weight, kind)
            if target is None:
                continue
            path = owner.whole
            wrong, experts = meant.wrong, meant.weight.experts
            if meant.expert is not None and meant.expert >= experts:
                wrong = f"there is no expert {meant.expert}: experts are 0 to {experts - 1}"
            if wrong:
                yield no_place(path, wrong)
            elif isinstance(owner.module, LoadableLayer):
                yield _sharded(target, path, meant)
            else:
                yield from _boxes(target, path, kind, meant)

    def _owners(self, walked: Walked) -> Iterator[Walked]:
        if self._of(walked.module):
            yield walked
        elif walked.rest and walked.rest[0] in PROJECTIONS:
            children = [
                (name, child)
                for name, child in walked.module._modules.items()
                if child is not None and self._of(child)
            ]
            if len(children) == 1:
                name, child = children[0]
                yield Walked(child, join(walked.path, name), walked.rest)

    def _of(self, module: nn.Module) -> tuple[ExpertWeight, ...]:
        if id(module) not in self._weights:
            self._weights[id(module)] = expert_weights(module) or ()
        return self._weights[id(module)]

    def _target(self, module: nn.Module, weight: ExpertWeight, kind: str) -> Target | None:
        if kind == "weight":
            return self._names.target(module, weight.name)
        stem = weight.name.removesuffix("_weight")
        found = (self._names.target(module, f"{stem}{end}") for end in ("_bias", ".bias"))
        return next((target for target in found if target is not None), None)


def _named(rest: Sequence[str]) -> tuple[list[str], str]:
    """A split "3.gate_proj.weight" as names of a projection, and "weight" or "bias"."""
    names = [name for name in rest if name != "base_layer"]
    if len(names) > 1 and names[-1] in ("weight", "bias"):
        return names[:-1], names[-1]
    stem = names[-1].removesuffix("_bias") if names else ""
    if stem in PROJECTIONS and stem != names[-1]:
        return [*names[:-1], stem], "bias"
    return names, "weight"


def _boxes(target: Target, path: str, kind: str, meant: ExpertMeaning) -> Iterator[Destination]:
    """As stored by the parameter's own name, else as (out, in); then, where shapes fit, turned."""
    weight = meant.weight
    assert weight is not None
    box = Box.whole(target)
    dims = len(box.box)
    out = dims - 1 if kind == "bias" or weight.transposed else dims - 2
    box = box.narrowed(out, _columns(len(box.box[out]), weight, meant.half))
    if meant.expert is not None:
        box = box.narrowed(0, range(meant.expert, meant.expert + 1))
    orders = [box]
    if kind == "weight":
        orders = [box, box.swapped()]
        if weight.transposed and not meant.own:
            orders.reverse()
    for oriented in orders:
        shape = oriented.shape if meant.expert is None else oriented.shape[1:]
        # Other names than the parameter's own determine the orientation.
        turned = oriented is not box if meant.own else None
        yield Destination(path, shape, (Cut(oriented),), turned=turned)


def _columns(size: int, weight: ExpertWeight, half: Half) -> range:
    if half == "all" or not weight.halves:
        return range(size)
    if weight.halves == "interleaved":
        return range(half == "up", size, 2)
    return range(size // 2) if half == "gate" else range(size // 2, size)


def _sharded(target: Target, path: str, meant: ExpertMeaning) -> Destination:
    weight, half, expert = meant.weight, meant.half, meant.expert
    assert weight is not None
    kinds = ["w2"] if weight.down else ["w1", "w3"] if half == "all" else [_SHARDS[half]]
    try:
        if expert is None and half == "all":
            whole = Shard(target)
            return Destination(path, whole.shape, (Cut(whole),))
        rows, *others = Shard(target, (kinds[0], expert or 0)).shape
        cuts = tuple(
            Cut(Shard(target, (kind, e)), (*lead, slice(i * rows, (i + 1) * rows)))
            for e, lead in (
                [(expert, ())] if expert is not None else [(e, (e,)) for e in range(weight.experts)]
            )
            for i, kind in enumerate(kinds)
        )
    except CheckpointError as error:
        return no_place(path, str(error))
    shape = (len(kinds) * rows, *others)
    return Destination(path, shape if expert is not None else (weight.experts, *shape), cuts)
