"""Where checkpoint tensors of routed experts go.

    experts.3.gate_proj.weight    W_up[3, gate rows, :]      w1, w3, w2 the same in Mixtral's words
    experts.gate_proj             W_up[:, gate rows, :]      the gates of all experts
    experts.gate_up_proj          W_up                       w13, w13_weight; either orientation
    moe.gate_proj.weight          the same without the name of the module of experts

Names and halves are those of adapters (lorafx.model.expert_names).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from lorafx.base_weights.names import Names, Walked
from lorafx.base_weights.weight_places import Box, Cut, Landing, Shard, Target
from lorafx.errors import CheckpointError
from lorafx.layers.moe import FusedMoE
from lorafx.model.expert_names import PROJECTIONS, Half, covers
from lorafx.model.experts import ExpertWeight, expert_weights
from lorafx.model.module_graph import join
from lorafx.registry import lookup

_SHARDS: dict[Half, str] = {"gate": "w1", "up": "w3"}


class _Saved(NamedTuple):
    """A name below a module of experts: whose, which projection, and weight or bias."""

    expert: int | None
    name: str
    kind: str


class ExpertLandings:
    """Finds the places of tensors of routed experts in one model."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._weights: dict[int, tuple[ExpertWeight, ...]] = {}

    def landings(self, walked: Walked) -> Iterator[Landing]:
        """What a name that was walked as far as it led may mean among experts."""
        for owner in self._owners(walked):
            saved = _parse(owner.rest)
            for weight in self._of(owner.module):
                if saved is None:
                    continue
                own = saved.name == weight.name
                if not own and saved.name not in PROJECTIONS:
                    continue
                half = "all" if own else covers(weight, saved.name)
                if half is None:
                    continue
                target = self._target(owner.module, weight, saved.kind)
                if target is None:
                    continue
                path = join(owner.path, ".".join(owner.rest))
                wrong = _out_of_range(saved, weight)
                if wrong:
                    yield Landing(path, None, (), wrong)
                elif isinstance(owner.module, FusedMoE):
                    yield _sharded(target, path, weight, half, saved.expert)
                else:
                    yield from _boxes(target, path, weight, half, saved, own=own)

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
        """The two parameters of `module` if it is one of routed experts."""
        if id(module) not in self._weights:
            entry = lookup(module)
            plain = entry is None or entry.kind == "experts"
            self._weights[id(module)] = (expert_weights(module) or ()) if plain else ()
        return self._weights[id(module)]

    def _target(self, module: nn.Module, weight: ExpertWeight, kind: str) -> Target | None:
        if kind == "weight":
            return self._names.target(module, weight.name)
        stem = weight.name.removesuffix("_weight")
        found = (self._names.target(module, f"{stem}{end}") for end in ("_bias", ".bias"))
        return next((target for target in found if target is not None), None)


def _parse(rest: Sequence[str]) -> _Saved | None:
    """The names that are left below a module of experts, "3.gate_proj.weight" or "w13_weight"."""
    parts = [part for part in rest if part != "base_layer"]
    expert = int(parts.pop(0)) if parts and parts[0].isdigit() else None
    kind = "weight"
    if len(parts) == 2 and parts[1] in ("weight", "bias"):
        kind = parts.pop()
    if len(parts) != 1:
        return None
    (name,) = parts
    if name not in PROJECTIONS:
        for suffix in ("weight", "bias"):
            if name.removesuffix(f"_{suffix}") in PROJECTIONS:
                return _Saved(expert, name.removesuffix(f"_{suffix}"), suffix)
    return _Saved(expert, name, kind)


def _out_of_range(saved: _Saved, weight: ExpertWeight) -> str:
    if saved.expert is None or saved.expert < weight.experts:
        return ""
    return f"there is no expert {saved.expert}: experts are 0 to {weight.experts - 1}"


def _boxes(
    target: Target, path: str, weight: ExpertWeight, half: Half, saved: _Saved, *, own: bool
) -> Iterator[Landing]:
    """The box of a projection: as the model stores it where the parameter's own name is given, as
    (out, in) by other names; then the other way round, for shapes that fit that alone."""
    box = Box.whole(target)
    dims = len(box.box)
    out = dims - 1 if saved.kind == "bias" or weight.transposed else dims - 2
    if own and weight.halves == "interleaved":
        half = "all"
    elif saved.name in ("w13", "gate_up_proj") and weight.halves == "interleaved" and not own:
        reason = (
            f"gate and up of {weight.name} are interleaved, and {saved.name} may mean them so or "
            f"one after the other; give the tensor as {weight.name}, or as w1 and w3"
        )
        yield Landing(path, None, (), reason)
        return
    box = box.narrowed(out, _columns(len(box.box[out]), weight, half))
    if saved.expert is not None:
        box = box.narrowed(0, range(saved.expert, saved.expert + 1))
    orders = [box]
    if saved.kind == "weight":
        orders = [box, box.swapped()]
        if weight.transposed and not own:
            orders.reverse()
    for oriented in orders:
        shape = oriented.shape[1:] if saved.expert is not None else oriented.shape
        # Other names than the parameter's own say which way round it is.
        yield Landing(path, shape, (Cut(oriented),), turned=oriented is not box if own else None)


def _columns(size: int, weight: ExpertWeight, half: Half) -> range:
    if half == "all" or not weight.halves:
        return range(size)
    if weight.halves == "interleaved":
        return range(half == "up", size, 2)
    return range(size // 2) if half == "gate" else range(size // 2, size)


def _sharded(
    target: Target, path: str, weight: ExpertWeight, half: Half, expert: int | None
) -> Landing:
    """The shards of a layer that cuts experts' tensors itself."""
    layer = target.module
    assert isinstance(layer, FusedMoE)
    kinds = ["w2"] if weight.down else ["w1", "w3"] if half == "all" else [_SHARDS[half]]
    try:
        if expert is None and half == "all":
            whole = Shard(target)
            return Landing(path, whole.shape, (Cut(whole),))
        each = Shard(target, (kinds[0], expert or 0)).shape
        shape = (len(kinds) * each[0], *each[1:])
        cuts = tuple(
            Cut(
                Shard(target, (kind, e)),
                (*(() if expert is not None else (e,)), slice(i * each[0], (i + 1) * each[0])),
            )
            for e in ([expert] if expert is not None else range(layer.num_experts))
            for i, kind in enumerate(kinds)
        )
    except CheckpointError as error:
        return Landing(path, None, (), str(error))
    return Landing(path, shape if expert is not None else (layer.num_experts, *shape), cuts)
