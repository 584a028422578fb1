"""load_weights: checkpoint tensors into a model, several of them into one packed parameter.

    (name, tensor) → stacked mapping → (parameter, shard id) → the parameter's weight_loader

`q_proj.weight`, `k_proj.weight`, `v_proj.weight` go into slices of `qkv_proj.weight`. Names are
compared by whole dotted segments: `gate` is not a part of `gate_up_proj`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.errors import CheckpointError, nearest
from lorafx.layers.loading import LoadableLayer
from lorafx.layers.quantization import QuantizeMethodBase
from lorafx.model.packed_names import ATTRIBUTE, members_of

#: (segments of the parameter's name, segments of the checkpoint's name, shard id)
Stacked = tuple[str, str, Any]
_SHOWN = 20


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    stacked: Sequence[Stacked] | None = None,
    strict: bool = True,
) -> set[str]:
    """Load checkpoint tensors into the parameters and persistent buffers of `model`.

    Args:
        weights: (name, tensor) pairs, taken one at a time. A mapping, or a list or tuple of pairs,
            is checked as a whole before anything is written; of another iterable each tensor is
            checked before it is written, and nothing is written after the first problem.
        stacked: (name in the model, name in the checkpoint, shard id), e.g.
            ("qkv_proj", "q_proj", "q"), ("in_proj_qkvz", "in_proj_qkv", (0, 1, 2)). By default
            what the model and its modules declare in `packed_modules_mapping`.
        strict: tensors that the model has no place for, and parts of it that got no tensor, are
            errors too.

    Returns:
        Names of the parameters and buffers that were loaded, wholly or partly. Of tied ones
        all names.

    Raises:
        CheckpointError: all unknown, missing, duplicate and misshapen names, in one.
        ConfigError: a `packed_modules_mapping` of another form.
    """
    entries = _declared(model) if stacked is None else [_Entry("", *entry) for entry in stacked]
    loading = _Loading(model, entries, strict)
    if isinstance(weights, Mapping):
        weights = list(weights.items())
    if isinstance(weights, (list, tuple)):
        check = _Loading(model, entries, strict)
        for name, tensor in weights:
            check.take(name, tensor, write=False)
        check.finish()
    for name, tensor in weights:
        loading.take(name, tensor, write=not loading.problems)
    loading.finish()
    for module in loading.touched:
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)
    return {name for name in loading.places if id(loading.places[name].tensor) in loading.filled}


@dataclass(frozen=True)
class _Entry:
    """One entry of a stacked mapping.

    Attributes:
        scope: path of the module that it holds below.
        param, saved: segments of the name in the model, and in the checkpoint.
        names: how many names share the parameter by a slice each; None where the shard id was
            given.
    """

    scope: str
    param: str
    saved: str
    shard_id: Any
    names: int | None = None


@dataclass(frozen=True)
class _Place:
    """A parameter or buffer: the module that holds it and its name there."""

    module: nn.Module
    name: str
    tensor: Tensor

    def pieces(self, shard_id: Any = None) -> frozenset[Any]:
        """What a shard id fills; one piece for tensors that are not stacked."""
        if isinstance(self.module, LoadableLayer):
            return self.module.pieces(self.name, shard_id)
        return frozenset([None])

    def check(self, shape: Sequence[int], shard_id: Any) -> None:
        module = self.module
        if isinstance(module, LoadableLayer):
            module.check_weight(self.name, shape, shard_id)
        elif self.tensor.is_meta:
            raise CheckpointError("it is on the meta device and holds no values")
        elif _has_own_loader(self.tensor):
            return
        elif shard_id is not None:
            raise CheckpointError(
                f"{type(module).__name__} has no slices, and shard id {shard_id!r} is asked for"
            )
        elif tuple(shape) != tuple(self.tensor.shape):
            raise CheckpointError(
                f"the checkpoint's tensor has shape {tuple(shape)}, the model's "
                f"{tuple(self.tensor.shape)}"
            )

    def write(self, loaded: Tensor, shard_id: Any) -> None:
        if _has_own_loader(self.tensor):
            arguments = () if shard_id is None else (shard_id,)
            self.tensor.weight_loader(self.tensor, loaded, *arguments)  # type: ignore[attr-defined]
        else:
            with torch.no_grad():
                self.tensor.copy_(loaded)


def _has_own_loader(tensor: Tensor) -> bool:
    return callable(getattr(tensor, "weight_loader", None))


@dataclass
class _Loading:
    """One pass over the checkpoint: what was found, what was wrong."""

    model: nn.Module
    entries: list[_Entry]
    strict: bool
    problems: list[str] = field(default_factory=list)
    #: By identity of the tensor: its pieces, each with the names, in the checkpoint and in the
    #: model, that it was filled under.
    filled: dict[int, dict[Any, tuple[str, str]]] = field(default_factory=dict)
    touched: dict[nn.Module, None] = field(default_factory=dict)
    #: Tensors that something was wrong with: what they lack is said already.
    faulty: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.places: dict[str, _Place] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                holder, _, own = name.rpartition(".")
                module = self.model.get_submodule(holder)
                self.places[name] = _Place(module, own, tensor)

    def take(self, name: str, loaded: Tensor, *, write: bool) -> None:
        """Check one tensor, and load it."""
        target = self._target(name)
        if target is None:
            return
        own, shard_id = target
        place = self.places[own]
        label = name if name == own else f"{name} → {own}"
        try:
            place.check(loaded.shape, shard_id)
            pieces = place.pieces(shard_id)
        except CheckpointError as error:
            self._fault(place, f"{label}: {error}")
            return
        filled = self.filled.setdefault(id(place.tensor), {})
        before = {filled[piece] for piece in pieces if piece in filled}
        earlier_names = ", ".join(sorted(saved for saved, _ in before))
        if any(target == own for _, target in before):
            self._fault(place, f"{label}: a duplicate of {earlier_names}")
            return
        for tensor in self._fills(place, loaded):
            self.filled.setdefault(id(tensor), {}).update(dict.fromkeys(pieces, (name, own)))
        if not write:
            return
        try:
            earlier = place.tensor.detach().clone() if before else None
            place.write(loaded, shard_id)
        except (AssertionError, RuntimeError, ValueError) as error:  # of loaders of any kind
            self._fault(place, f"{label}: {error}")
            return
        self.touched[place.module] = None
        if earlier is not None and not torch.equal(earlier, place.tensor):
            self.problems.append(
                f"{label}: the model ties it to {earlier_names}, and the checkpoint's differ"
            )

    def finish(self) -> None:
        """Raises CheckpointError for everything that was wrong."""
        if self.strict:
            self.problems.extend(self._missing())
        if self.problems:
            shown = "".join(f"\n  - {problem}" for problem in self.problems[:_SHOWN])
            rest = len(self.problems) - _SHOWN
            more = f"\n  - and {rest} more" if rest > 0 else ""
            raise CheckpointError(f"{len(self.problems)} problems with the weights:{shown}{more}")

    def _fault(self, place: _Place, problem: str) -> None:
        self.problems.append(problem)
        self.faulty.add(id(place.tensor))

    def _target(self, name: str) -> tuple[str, Any] | None:
        """The parameter's name and the shard id, or None for a tensor without a place."""
        if name in self.places:
            return name, None
        found = {
            candidate: entry
            for entry in self.entries
            for candidate in _replaced(name, entry)
            if candidate in self.places
        }
        if not found:
            if self.strict:
                self.problems.append(f"{name}: no place in the model{nearest(name, self.places)}")
            return None
        if len(found) > 1:
            self.problems.append(f"{name}: the stacked mapping sends it to {', '.join(found)}")
            return None
        ((own, entry),) = found.items()
        slices = len(self.places[own].pieces())
        if entry.names not in (None, slices):
            self.problems.append(
                f"{name} → {own}: {ATTRIBUTE} gives {entry.names} names for its {slices} slices; "
                f"say which slices each name covers, {{{entry.param!r}: {{{entry.saved!r}: (0, ...)"
                ", ...}}"
            )
            return None
        return own, entry.shard_id

    def _fills(self, place: _Place, loaded: Tensor) -> list[Tensor]:
        """The tensors that get values: with a weight also what is computed of it, as scales."""
        module = place.module
        if not isinstance(module, LoadableLayer):
            return [place.tensor]
        return [module.get_parameter(name) for name in module.fills(place.name, loaded.dtype)]

    def _missing(self) -> list[str]:
        problems = []
        seen: set[int] = set()
        for name, place in self.places.items():
            if id(place.tensor) in seen | self.faulty:
                continue
            seen.add(id(place.tensor))
            pieces = place.pieces()
            missing = pieces - self.filled.get(id(place.tensor), {}).keys()
            if missing == pieces:
                problems.append(f"{name}: nothing in the checkpoint")
            elif missing:
                lacking = ", ".join(sorted(map(str, missing)))
                problems.append(f"{name}: nothing in the checkpoint for slices {lacking}")
        return problems


def _replaced(name: str, entry: _Entry) -> Iterable[str]:
    """`name`, below the entry's scope, with one run of segments replaced as it says."""
    start = 0
    if entry.scope:
        if not name.startswith(f"{entry.scope}."):
            return
        start = entry.scope.count(".") + 1
    segments, saved = name.split("."), entry.saved.split(".")
    for i in range(start, len(segments) - len(saved) + 1):
        if segments[i : i + len(saved)] == saved:
            yield ".".join([*segments[:i], entry.param, *segments[i + len(saved) :]])


def _declared(model: nn.Module) -> list[_Entry]:
    """The mappings that the model and its modules declare."""
    entries = []
    for path, module in model.named_modules():
        where = f"{type(module).__qualname__}.{ATTRIBUTE}"
        declared = members_of(getattr(module, ATTRIBUTE, None), where)
        for packed, members in declared.items():
            for index, member in enumerate(members):
                if member.slices is None:
                    entries.append(_Entry(path, packed, member.name, index, len(members)))
                else:
                    entries.append(_Entry(path, packed, member.name, member.slices))
    return entries
