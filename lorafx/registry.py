"""Which module classes may carry LoRA, looked up along the class hierarchy.

Subclasses of a registered class are eligible with it, and the nearest entry along the MRO wins.
Built in: `nn.Linear`, `nn.Embedding`, `nn.Conv1d` to `nn.Conv3d`, the packed input projection of
`nn.MultiheadAttention`, transformers' `Conv1D`, bitsandbytes' `Linear4bit` and `Linear8bitLt`, and
gptqmodel's linears.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lorafx.errors import ConfigError, nearest
from lorafx.libraries import class_of_library
from lorafx.placements import Placements, is_placed

Kind = Literal["linear", "embedding", "experts", "conv"]
#: Kinds that classes can be registered with; convolutions are torch's own.
KINDS: tuple[Kind, ...] = ("linear", "embedding", "experts")
SizeOf = str | Callable[[nn.Module], int]
SizesOf = str | Callable[[nn.Module], Sequence[int]]


class Sharding(Protocol):
    """How the checkpoint of a tensor-parallel module maps to this rank's share of it."""

    def saved_sizes(self, module: nn.Module) -> tuple[int, tuple[int, ...]]:
        """K and the size of each output slice in a checkpoint."""
        ...

    def cut(
        self, module: nn.Module, slices: tuple[int, ...], A: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This rank's share of A (…, r, K) and B (…, N, r), N the columns of `slices`; routed
        experts have (E, r, K) and (E, N, r)."""
        ...

    def product(self, module: nn.Module) -> nn.Module:
        """The module whose call maps this rank's inputs to this rank's outputs, before they are
        summed or gathered over the ranks; `module` itself if its call does."""
        ...


class Add(Protocol):
    """Adds a site's delta to the columns [start, start + n) of the product with its weight.

    x (…, K) and y (…, n) → y + Δ(x)[…, start : start + n]; for an embedding x is ids (…) and y has
    all N columns.
    """

    def __call__(self, x: Tensor, y: Tensor, start: int = 0) -> Tensor: ...


#: (module, args, kwargs, output, add) → the output of the call with the delta added.
Handler = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any, Add], Any]


@dataclass(frozen=True)
class Eligible:
    """One registered class: how to read the sizes and the weight of its instances. `register`
    describes the other fields.

    Attributes:
        kind: "linear" (y = x Wᵀ), "embedding" (y = W[ids]), "conv" (a convolution of torch's) or
            "experts" (routed experts, lorafx.model.experts).
        sizes: instance -> (in_features, out_features); of a convolution the entries of one kernel
            over all channels, and the output channels.
        sharding, weight_shardings: those of the weight, or of the parameters of experts by name;
            None or empty if modules have the same tensors as checkpoints.
        inner: whether the product with the weight is not the result of the forward, so that it is
            only found in the graph. "all-linear" and the default leave such classes out.
        carries: the attributes of children to which PEFT gives factors together with the module,
            and how many times it adds their delta.
    """

    cls: type[nn.Module]
    kind: Kind
    sizes: Callable[[nn.Module], tuple[int, int]]
    weight: str = "weight"
    transposed: bool = False
    output_sizes: Callable[[nn.Module], tuple[int, ...]] | None = None
    sharding: Sharding | None = None
    handler: Handler | None = None
    rank_shards: Callable[[nn.Module], int] | None = None
    dequantize: Callable[[nn.Module], Tensor] | None = None
    requantize: Callable[[nn.Module, Tensor], None] | None = None
    weight_shardings: Mapping[str, Sharding] = field(default_factory=dict, hash=False)
    inner: bool = False
    carries: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def is_linear(self) -> bool:
        """Whether "all-linear" means its instances."""
        return self.kind == "linear" and not self.inner


@dataclass(frozen=True)
class FeatureSizes:
    """Reads (in_features, out_features) of an instance by attribute name or function."""

    in_features: SizeOf
    out_features: SizeOf

    def __call__(self, module: nn.Module) -> tuple[int, int]:
        return _read(module, self.in_features), _read(module, self.out_features)


@dataclass(frozen=True)
class SliceSizes:
    """Reads the sizes of an instance's output slices by attribute name or function."""

    sizes: SizesOf

    def __call__(self, module: nn.Module) -> tuple[int, ...]:
        value: Any = _read(module, self.sizes)
        return (value,) if isinstance(value, int) else tuple(value)

    def total(self, module: nn.Module) -> int:
        return sum(self(module))


@dataclass(frozen=True)
class _FirstOf:
    """Reads the first of several attributes that an instance has; a function always counts."""

    sources: tuple[SizeOf | SizesOf, ...]

    def __call__(self, module: nn.Module) -> Any:
        for source in self.sources:
            if not isinstance(source, str) or hasattr(module, source):
                return _read(module, source)
        raise AttributeError(
            f"{type(module).__qualname__} has no {' or '.join(map(str, self.sources))}; say which "
            "attributes hold the sizes: register_oot(..., input_size=, output_sizes=)"
        )


def shardings(
    sharding: Sharding | Mapping[str, Sharding] | None,
) -> tuple[Sharding | None, Mapping[str, Sharding]]:
    return (None, dict(sharding)) if isinstance(sharding, Mapping) else (sharding, {})


def _read(module: nn.Module, size: SizeOf | SizesOf) -> Any:
    return getattr(module, size) if isinstance(size, str) else size(module)


def _kernel_entries(module: nn.Module) -> int:
    assert isinstance(module, _CONVOLUTIONS)
    return module.in_channels * math.prod(module.kernel_size)


def _attention_sizes(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.MultiheadAttention)
    if module.in_proj_weight is None:
        raise ValueError("query, key and value have weights of their own; PEFT refuses it too")
    return module.embed_dim, 3 * module.embed_dim


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BUILT_IN: dict[type[nn.Module], Eligible] = {
    nn.Linear: Eligible(nn.Linear, "linear", FeatureSizes("in_features", "out_features")),
    nn.Embedding: Eligible(
        nn.Embedding, "embedding", FeatureSizes("num_embeddings", "embedding_dim")
    ),
    **{
        cls: Eligible(cls, "conv", FeatureSizes(_kernel_entries, "out_channels"))
        for cls in _CONVOLUTIONS
    },
    # PEFT (tuners.lora.layer.MultiheadAttention, 0.14 to 0.21) merges the delta of out_proj into
    # its weight for each call, and the wrapper of out_proj merges it once more.
    nn.MultiheadAttention: Eligible(
        nn.MultiheadAttention,
        "linear",
        _attention_sizes,
        weight="in_proj_weight",
        inner=True,
        carries={"out_proj": 2},
    ),
}
#: Linears of libraries by their homes: the attributes of K and N, and whether W is (K, N).
_OF_LIBRARIES = {
    ("transformers.pytorch_utils", "Conv1D"): ("nx", "nf", True),
    ("bitsandbytes.nn.modules", "Linear4bit"): ("in_features", "out_features", False),
    ("bitsandbytes.nn.modules", "Linear8bitLt"): ("in_features", "out_features", False),
    # What transformers loads GPTQ's and AWQ's checkpoints into.
    ("gptqmodel.nn_modules.qlinear", "BaseQuantLinear"): ("in_features", "out_features", False),
}
_REGISTERED: dict[type[nn.Module], Eligible] = {}


def register(
    cls: type[nn.Module],
    *,
    kind: Kind = "linear",
    in_features: SizeOf = "in_features",
    out_features: SizeOf = "out_features",
    weight: str = "weight",
    transposed: bool = False,
    output_sizes: SizesOf | None = None,
    sharding: Sharding | Mapping[str, Sharding] | None = None,
    handler: Handler | None = None,
    rank_shards: Callable[[nn.Module], int] | None = None,
    dequantize: Callable[[nn.Module], Tensor] | None = None,
    requantize: Callable[[nn.Module, Tensor], None] | None = None,
) -> Eligible:
    """Make `cls` and its subclasses eligible; a later call for the same class replaces this one.

    Args:
        cls: the class. Its forward must compute y = x Wᵀ (+ bias) over the last dimension, or
            y = W[ids] for kind "embedding", unless a handler places the delta.
        in_features, out_features: attribute name, or a function of the instance, giving K and
            N; for embeddings the vocabulary and the dimension.
        weight: attribute of W, which may be absent or packed in quantised classes.
        transposed: whether W is stored as (in, out).
        output_sizes: for a class that computes several projections at once, attribute name or
            function giving the columns of each; their sum is N. Names come from
            `packed_modules_mapping` or LoraConfig(packed_modules=...).
        sharding: for a tensor-parallel class, how factors of a checkpoint become this rank's; for
            kind "experts" a mapping from parameter names to that.
        handler: `handler(module, args, kwargs, output, add)` returns the output of a call with the
            delta added, by calls of `add(x, y, start=0)`, which returns
            y + Δ(x)[..., start : start + y.shape[-1]]. It is for forwards that work on groups of
            columns or return more than y. It is trusted, applies to subclasses too, runs in eager
            mode and is traced in graphs; defined at module level it can be pickled.
        rank_shards: for a class that shards the rank of its factors over processes, a function of
            the instance giving their number; the rank of `warmup`'s adapters is a multiple of it.
        dequantize: for a class that stores its weight in a format of its own (packed integers,
            scales), a function of the instance giving W (N, K) of y = x Wᵀ, or (V, D) for an
            embedding. `lorafx.dequantize` calls it; serving adapters does not need it.
        requantize: `requantize(module, W)` stores such a W in the instance, in place, keeping its
            tensors' sizes and dtypes. Without it adapters cannot be merged into the class.

    Raises ConfigError if `cls` is not a module class, `kind` is none of the three, or a function
    cannot be called.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ConfigError(f"register() takes an nn.Module class, got {cls!r}")
    if kind not in KINDS:
        known = ", ".join(map(repr, KINDS))
        raise ConfigError(f"register({cls.__qualname__}): kind is one of {known}, got {kind!r}")
    functions = {"handler": handler, "dequantize": dequantize, "requantize": requantize}
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ConfigError(f"register({cls.__qualname__}): {name}={function!r} cannot be called")
    if isinstance(sharding, Mapping) != (kind == "experts") and sharding is not None:
        raise ConfigError(
            f"register({cls.__qualname__}): sharding is a mapping from parameter names for "
            f"routed experts, and a single object for other kinds; got {sharding!r} for "
            f"kind {kind!r}"
        )
    whole, by_weight = shardings(sharding)
    _REGISTERED[cls] = entry = Eligible(
        cls,
        kind,
        FeatureSizes(in_features, out_features),
        weight,
        transposed,
        None if output_sizes is None else SliceSizes(output_sizes),
        whole,
        handler,
        rank_shards,
        dequantize,
        requantize,
        by_weight,
    )
    return entry


def register_oot(
    replaced: type[nn.Module],
    by: type[nn.Module],
    *,
    input_size: SizeOf | None = None,
    output_sizes: SizesOf | None = None,
    weight: str | None = None,
    sharding: Sharding | Mapping[str, Sharding] | None = None,
) -> Eligible:
    """Match `by`, which does not inherit from it, and its subclasses wherever `replaced` would
    match. Returns the entry for instances of `by`; `unregister(by)` removes it.

    Args:
        replaced: a class that is registered, or inherits from a registered class.
        by: the class that takes its place. Its forward computes the same product.
        input_size: attribute or function giving K; by default the attribute of `replaced`, or
            `input_size`. For embeddings the vocabulary.
        output_sizes: attribute or function giving the columns of each output slice; by default the
            attribute of `replaced`, or `output_sizes`, or `output_size` for one slice. For
            embeddings the dimension.
        weight: attribute that holds W; by default that of `replaced`.
        sharding: for tensor-parallel classes, as in `register`; sizes are then those of this rank.

    Raises:
        ConfigError: one of the two is not a module class, `replaced` is not registered, or `by` is
            a class that is matched without this. Selecting an instance that lacks the sizes or the
            weight raises TargetError.
    """
    for cls in (replaced, by):
        if not isinstance(cls, type) or not issubclass(cls, nn.Module):
            raise ConfigError(f"register_oot() takes two nn.Module classes, got {cls!r}")
    call = f"register_oot({replaced.__qualname__}, {by.__qualname__})"
    entry = lookup_class(replaced)
    if entry is None:
        raise ConfigError(
            f"{call}: no class along the MRO of {replaced.__qualname__} is registered, so there is "
            "nothing to replace; see lorafx.register"
        )
    if own_entry(by) is not None:
        raise ConfigError(
            f"{call}: {by.__qualname__} is already registered; call lorafx.unregister for it first"
        )
    known, sliced = entry.sizes, entry.output_sizes
    assert isinstance(known, FeatureSizes), entry.cls
    # N is the sum of the output slices.
    outputs = sliced.sizes if isinstance(sliced, SliceSizes) else known.out_features
    inputs = input_size or _FirstOf((known.in_features, "input_size"))
    slices = SliceSizes(output_sizes or _FirstOf((outputs, "output_sizes", "output_size")))
    whole, by_weight = shardings(sharding)
    _REGISTERED[by] = replace(
        entry,
        cls=by,
        sizes=FeatureSizes(inputs, slices.total),
        output_sizes=slices if entry.kind == "linear" else None,
        weight=weight or entry.weight,
        sharding=whole,
        weight_shardings=by_weight,
    )
    return _REGISTERED[by]


def unregister(cls: type[nn.Module]) -> None:
    """Undo `register(cls)` or `register_oot(..., cls)`; a built-in entry applies again. Raises
    ConfigError if `cls` is not registered."""
    if cls not in _REGISTERED:
        known = [c.__qualname__ for c in _REGISTERED]
        name = getattr(cls, "__qualname__", repr(cls))
        raise ConfigError(f"{name} was not registered{nearest(name, known)}")
    del _REGISTERED[cls]


def lookup(module: nn.Module) -> Eligible | None:
    """The entry of the nearest registered class along the MRO, or None; with this rank's sizes if
    the weight is a DTensor."""
    entry = lookup_class(type(module))
    if entry is None or entry.kind == "experts" or entry.sharding is not None:
        return entry
    weight = module._parameters.get(entry.weight)
    if not is_placed(weight) or weight is None or weight.dim() != 2:
        return entry
    placements = Placements(entry.weight, entry.transposed)
    return replace(entry, sizes=placements.local_sizes, sharding=placements)


def is_empty(module: nn.Module) -> bool:
    """Whether a registered instance has no inputs or no outputs, so that its weight is empty."""
    entry = lookup(module)
    if entry is None or entry.kind == "experts":
        return False
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return False  # its sizes are not known yet
    try:
        sizes = entry.sizes(module)
    except (AttributeError, TypeError, ValueError):
        return False
    return any(isinstance(size, int) and size == 0 for size in sizes)


def lookup_class(cls: type) -> Eligible | None:
    for base in cls.__mro__:
        entry = own_entry(base)
        if entry is not None:
            return entry
    return None


def own_entry(cls: type) -> Eligible | None:
    """The entry of this class itself, not of its base classes."""
    entry = _REGISTERED.get(cls) or _BUILT_IN.get(cls)
    home = cls.__module__, cls.__name__
    if entry is None and home in _OF_LIBRARIES and class_of_library(*home) is cls:
        inputs, outputs, transposed = _OF_LIBRARIES[home]
        entry = Eligible(cls, "linear", FeatureSizes(inputs, outputs), transposed=transposed)
    return entry


def registrations() -> tuple[object, ...]:
    """The entries of `register` and `register_oot`."""
    return tuple(_REGISTERED.values())
