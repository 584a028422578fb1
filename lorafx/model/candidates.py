"""What `select` may choose: a model's modules with all names that a target may use for them, and
why a module cannot carry LoRA, for the user who named it in `target_modules`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lorafx.model import targets
from lorafx.model.convolutions import impossible_convolution, weight_shape
from lorafx.model.experts import ExpertWeight, by_lorafx, checkpoint_names, folded, unlike_experts
from lorafx.model.packed_names import PackedNames, parts_of, virtual_paths
from lorafx.model.quantized import is_stored
from lorafx.model.sites import Part, has_own_forward
from lorafx.model.stored_experts import stored_of
from lorafx.model.weight_formats import is_dense, is_wrapped
from lorafx.placements import is_placed, local, refusal
from lorafx.registry import Eligible, lookup
from lorafx.torch_internals.dynamo import _ConvTransposeNd, _NormBase


class Candidate:
    """A module with its names. `members` are the names that it packs, or only "" if none."""

    def __init__(
        self,
        path: str,
        module: nn.Module,
        paths: tuple[str, ...],
        entry: Eligible | None,
        packed: PackedNames,
    ) -> None:
        self.path, self.module, self.paths, self.entry = path, module, paths, entry
        self.packed_members = packed.members(path) if entry is not None else ()
        self.member_of = packed.memberships(path) if entry is not None else ()
        self.members = frozenset(member.name for member in self.packed_members) or frozenset([""])

    #: For a parameter of routed experts.
    expert_weight: ExpertWeight | None = None

    @property
    def label(self) -> str:
        return f"{self.path or 'the model'} ({type(self.module).__qualname__})"

    @property
    def all_paths(self) -> Iterator[str]:
        yield from self.paths
        names = [member.name for member in self.packed_members]
        for name in (*names, *(packed.name for packed in self.member_of)):
            yield from virtual_paths(self.paths, name)

    def parts(
        self, slices: Sequence[int] | None, in_features: int, out_features: int
    ) -> tuple[tuple[Part, ...], tuple[str, ...]]:
        return parts_of("it", self.packed_members, slices, in_features, out_features)

    def named_by(self, spec: str | Sequence[str]) -> frozenset[str]:
        """The members that `spec` names, all of them where it names the module itself."""
        paths = self.paths
        for packed in self.member_of:
            paths += virtual_paths(self.paths, packed.name)
        if targets.names(spec, paths):
            return self.members
        return frozenset(
            member.name
            for member in self.packed_members
            if targets.names(spec, virtual_paths(self.paths, member.name))
        )


class ExpertsCandidate(Candidate):
    def __init__(
        self,
        path: str,
        module: nn.Module,
        paths: tuple[str, ...],
        weight: ExpertWeight,
        packed: PackedNames,
    ) -> None:
        weight_paths = tuple(weight.path(p) for p in paths)
        entry = weight.eligible(lookup(module))
        super().__init__(weight.path(path), module, weight_paths, entry, packed)
        self.module_paths, self.weight, self.expert_weight = paths, weight, weight

    def parts(
        self, slices: Sequence[int] | None, in_features: int, out_features: int
    ) -> tuple[tuple[Part, ...], tuple[str, ...]]:
        """Gate and up are two parts if they are not interleaved: older adapters have an A each."""
        count = 2 if self.weight.halves == "stacked" else 1
        size = out_features // count
        return tuple(Part("", (i,), in_features, size) for i in range(count)), ()

    @property
    def all_paths(self) -> Iterator[str]:
        yield from (*self.paths, *self.module_paths)
        for path in self.module_paths:
            yield from checkpoint_names(self.weight, path)

    def named_by(self, spec: str | Sequence[str]) -> frozenset[str]:
        if not isinstance(spec, str):
            named = targets.names(_folded(targets.Entries(spec)), self.all_paths)
            return self.members if named else frozenset()
        for expert in range(self.weight.experts):
            names = (n for p in self.module_paths for n in checkpoint_names(self.weight, p, expert))
            if targets.names(spec, names):
                return self.members
        return self.members if targets.names(spec, self.all_paths) else frozenset()


@functools.lru_cache(maxsize=4)  # every module is compared with the same list of targets
def _folded(entries: targets.Entries) -> targets.Entries:
    return targets.Entries(folded(entry) for entry in entries)


def by_raw_weight(module: nn.Module) -> Eligible | None:
    """An entry for a module of no registered class that holds one matrix, or a `weight`: a router,
    or a name in PEFT's `target_parameters`. `match` finds where it multiplies."""
    matrices = {n: p for n, p in module._parameters.items() if p is not None and p.dim() == 2}
    name = "weight" if "weight" in matrices or len(matrices) != 1 else next(iter(matrices))
    weight = matrices.get(name)
    if weight is None or not is_dense(weight) or unsupported(module):
        return None
    out_features, in_features = weight.shape
    return Eligible(nn.Module, "linear", lambda _: (in_features, out_features), weight=name)


#: What a user can do about a module that cannot carry LoRA.
LEAVE = "leave it out of target_modules, or name it in exclude_modules"

# Torch's own classes; the first that the module is an instance of counts.
_UNSUPPORTED: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((_ConvTransposeNd,), "transposed convolutions carry no LoRA, here or in PEFT"),
    ((nn.EmbeddingBag,), "embedding bags, which sum rows of their weight, carry no LoRA"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layers carry no LoRA"),
    ((nn.Bilinear,), "it multiplies two inputs by a 3-D weight, which carries no LoRA"),
    (
        (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
        "it scales its input and multiplies by no matrix, so it carries no LoRA",
    ),
)


def unsupported(module: nn.Module) -> str | None:
    """Why instances of this class of torch's carry no LoRA; None for all other modules."""
    return next((why for classes, why in _UNSUPPORTED if isinstance(module, classes)), None)


def impossible(module: nn.Module, entry: Eligible | None) -> str | None:
    """Why this module, with its registry `entry`, cannot carry LoRA, and what to do; else None."""
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "torch.jit compiled it, and nothing is added inside of it; give lorafx the module from "
            f"before torch.jit.script or torch.jit.trace, or {LEAVE}"
        )
    if entry is None:
        return _unregistered(module)
    ranks = getattr(module, "tp_size", 1)
    if entry.kind == "experts" and entry.sharding is None and ranks > 1:
        return (
            f"{ranks} ranks share its experts, but its class does not declare which part of "
            "the factors each rank keeps; see lorafx.register(sharding=...)"
        )
    if why := refusal(module, entry.weight):
        return why
    if entry.kind == "experts" and by_lorafx(module):
        stored = stored_of(module, entry.weight)
        if isinstance(stored, str):
            return stored
    if entry.kind not in ("linear", "experts") and is_placed(getattr(module, entry.weight, None)):
        return f"its weight is a DTensor, which is served for linears and experts only; {LEAVE}"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "its parameters are not initialised yet; run the model once before"
    try:
        sizes = entry.sizes(module)
    except (AttributeError, TypeError, ValueError) as error:
        return f"its sizes cannot be read ({error}); see lorafx.register(in_features=...)"
    if not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes):
        return (
            f"its sizes (in, out) are {sizes}, but must be positive integers; set them, or "
            "see lorafx.register(in_features=...)"
        )
    if entry.kind == "embedding" and getattr(module, "max_norm", None) is not None:
        return (
            "it has max_norm, so its forward rewrites the weight and there is no fixed W "
            f"to add ΔW to; set max_norm = None if that is not intended, or {LEAVE}"
        )
    if entry.kind == "conv" and (why := impossible_convolution(module, entry)):
        return f"{why}; {LEAVE}"
    weight = weight_of(module, entry)
    if weight is None:
        return None
    return _weight_misfit(module, weight, sizes, entry) or _unreachable(module, weight, entry)


def weight_of(module: nn.Module, entry: Eligible) -> Tensor | None:
    weight = getattr(module, entry.weight, None)
    return local(weight) if isinstance(weight, Tensor) else None


def _unregistered(module: nn.Module) -> str:
    why = unsupported(module) or unlike_experts(module)
    if why is not None:
        return f"{why}; {LEAVE}"
    if any(parameter is not None for parameter in module._parameters.values()):
        return (
            "its class is not registered, nor is any class that it derives from, so lorafx "
            f"does not know what it computes; see lorafx.register, or {LEAVE}"
        )
    if next(module.children(), None) is not None:
        return f"it has no weight of its own; name modules inside it, or {LEAVE}"
    return f"it has no weight; {LEAVE}"


def _unreachable(module: nn.Module, weight: Tensor, entry: Eligible) -> str | None:
    """Why the delta cannot be added between this rank's product and the reduction over ranks."""
    if entry.sharding is None or entry.handler is not None or not is_stored(module, entry):
        return None
    if entry.sharding.product(module) is module or not has_own_forward(module, entry):
        return None
    return (
        f"its class overrides forward, its weight is stored as {weight.dtype}, and several "
        "ranks share it; see lorafx.register(handler=...)"
    )


def _weight_misfit(
    module: nn.Module, weight: Tensor, sizes: tuple[int, int], entry: Eligible
) -> str | None:
    if weight.layout is not torch.strided:
        return (
            f"its weight is a sparse tensor ({weight.layout}); make it dense (weight.to_dense()), "
            f"or {LEAVE}"
        )
    # Packed and 8-bit formats store W in shapes of their own; the declared sizes stand.
    if not is_wrapped(weight) and is_stored(module, entry):
        return None
    in_features, out_features = sizes
    if entry.kind == "experts":
        return None  # its sizes are its shape's
    as_stored = entry.kind == "embedding" or entry.transposed
    expected: tuple[int, ...] = (out_features, in_features)
    if entry.kind == "conv":
        expected = weight_shape(module)
    elif as_stored:
        expected = (in_features, out_features)
    if tuple(weight.shape) != expected:
        return (
            f"its weight has shape {tuple(weight.shape)}, but its sizes ask for {expected}, "
            "so its class computes something other than the registered one. Register the "
            f"class with its own sizes (lorafx.register), or {LEAVE}"
        )
    return None
