"""Where checkpoint tensors of routed experts go."""

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
from lorafx.model.saved_names import Walked
from lorafx.weights.loadable_layers import LoadableLayer, Shard
from lorafx.weights.targets import Target, WeightNames
from lorafx.weights.weight_places import Box, Destination, no_place

_SHARDS: dict[Half, str] = {"gate": "w1", "up": "w3"}


class ExpertDestinations:
    """Where checkpoint tensors of routed experts go; names and halves are those of adapters.

    experts.3.gate_proj.weight    W_up[3, gate rows, :]      w1, w3, w2 the same in Mixtral's names
    experts.gate_proj             W_up[:, gate rows, :]      the gates of all experts
    experts.gate_up_proj          W_up                       w13, w13_weight
    """

    def __init__(self, names: WeightNames) -> None:
        self._names = names
        self._weights: dict[int, tuple[ExpertWeight, ...]] = {}

    def destinations(self, walked: Walked) -> Iterator[Destination]:
        """The place of a name below a module of experts, if it is that of a projection."""
        names, kind = _split_kind(walked.remaining)
        weights = self._weights_of(walked.module)
        meant = meaning(weights, names) if weights else None
        if meant is None or meant.weight is None:
            return
        target = self._target(walked.module, meant.weight, kind)
        if target is None:
            return
        path = walked.full_path
        wrong, experts = meant.wrong, meant.weight.experts
        if meant.expert is not None and meant.expert >= experts:
            wrong = f"there is no expert {meant.expert}: experts are 0 to {experts - 1}"
        if wrong:
            yield no_place(path, wrong)
        elif isinstance(walked.module, LoadableLayer):
            yield _sharded(target, path, meant)
        else:
            yield _box(target, path, kind, meant)

    def _weights_of(self, module: nn.Module) -> tuple[ExpertWeight, ...]:
        if id(module) not in self._weights:
            self._weights[id(module)] = expert_weights(module, whole=True) or ()
        return self._weights[id(module)]

    def _target(self, module: nn.Module, weight: ExpertWeight, kind: str) -> Target | None:
        if kind == "weight":
            return self._names.target(module, weight.name)
        stem = weight.name.removesuffix("_weight")
        candidates = (self._names.target(module, f"{stem}{end}") for end in ("_bias", ".bias"))
        return next((target for target in candidates if target is not None), None)


def _split_kind(remaining: Sequence[str]) -> tuple[list[str], str]:
    """The names of a projection in a split "3.gate_proj.weight", and "weight" or "bias"."""
    names = [name for name in remaining if name != "base_layer"]
    if len(names) > 1 and names[-1] in ("weight", "bias"):
        return names[:-1], names[-1]
    stem = names[-1].removesuffix("_bias") if names else ""
    if stem in PROJECTIONS and stem != names[-1]:
        return [*names[:-1], stem], "bias"
    return names, "weight"


def _box(target: Target, path: str, kind: str, meant: ExpertMeaning) -> Destination:
    """In the parameter's layout under its own name; (out, in) under others and as `NAME.weight`."""
    weight = meant.weight
    assert weight is not None
    box = Box.whole(target)
    dims = len(box.box)
    out = dims - 1 if kind == "bias" or weight.transposed else dims - 2
    box = box.narrowed(out, _columns(len(box.box[out]), weight, meant.half))
    as_stored = meant.own and not path.endswith(".weight")
    if kind == "weight" and weight.transposed and not as_stored:
        box = box.swapped()
    if meant.expert is None:
        return Destination(path, box.shape, (box,))
    box = box.narrowed(0, range(meant.expert, meant.expert + 1))
    return Destination(path, box.shape[1:], (box,))


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
            shard = Shard(target)
            return Destination(path, shard.shape, (shard,))
        rows, *trailing = Shard(target, (kinds[0], expert or 0)).shape
        cuts = tuple(
            Shard(target, (kind, e), (*lead, slice(i * rows, (i + 1) * rows)))
            for e, lead in (
                [(expert, ())] if expert is not None else [(e, (e,)) for e in range(weight.experts)]
            )
            for i, kind in enumerate(kinds)
        )
    except CheckpointError as error:
        return no_place(path, str(error))
    shape = (len(kinds) * rows, *trailing)
    return Destination(path, shape if expert is not None else (weight.experts, *shape), cuts)
