"""Classes that replace a registered class without inheriting from it.

    register_oot(QKVParallelLinear, MyQKV):   lookup(MyQKV(...)) = lookup(QKVParallelLinear(...)),
                                              with the sizes and the weight that MyQKV offers

An instance is looked at where it is selected: only then does it have all attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorafx.errors import ConfigError, nearest
from lorafx.registry import (
    OUT_OF_TREE,
    Eligible,
    FeatureSizes,
    Sharding,
    SizeOf,
    SizesOf,
    lookup_class,
    own_entry,
    shardings,
)


def register_oot(
    replaced: type[nn.Module],
    by: type[nn.Module],
    *,
    input_size: SizeOf | None = None,
    output_sizes: SizesOf | None = None,
    weight: str | None = None,
    sharding: Sharding | Mapping[str, Sharding] | None = None,
) -> Eligible:
    """Match `by` and its subclasses wherever `replaced` would match; a later call for `by` replaces
    this one. Returns the entry that instances of `by` have.

    Args:
        replaced: a class that is registered, or inherits from a registered class.
        by: the class that takes its place. Its forward computes the same product.
        input_size: attribute or function giving K; by default `input_size`, or what `replaced`
            calls it. For embeddings `num_embeddings`.
        output_sizes: attribute or function giving the columns of each output slice; by default
            `output_sizes`, or `output_size` for one slice, or what `replaced` calls it. For
            embeddings `embedding_dim`.
        weight: attribute that holds W; by default that of `replaced`.
        sharding: for tensor-parallel classes, as in `register`; sizes are then those of this rank.

    Raises:
        ConfigError: one of the two is not a module class, `replaced` is not registered, or `by` is
            already registered. An instance without its sizes or weight is a TargetError where it
            is selected.
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
    if by not in OUT_OF_TREE and own_entry(by) is not None:
        raise ConfigError(
            f"{call}: {by.__qualname__} is already registered; call lorafx.unregister for it first"
        )
    embedding, sizes = entry.kind == "embedding", entry.sizes
    inputs: list[SizeOf] = ["num_embeddings" if embedding else "input_size"]
    outputs: list[SizeOf] = ["embedding_dim" if embedding else "output_sizes"]
    if not entry.packed:  # a packed class has to say all of its slices
        outputs.append("output_size")
    if isinstance(sizes, FeatureSizes):
        inputs.append(sizes.in_features)
        outputs += [] if entry.packed else [sizes.out_features]
    slices = _Slices(output_sizes or tuple(outputs))
    whole, by_weight = shardings(sharding)
    OUT_OF_TREE[by] = replace(
        entry,
        cls=by,
        sizes=FeatureSizes(_Size(input_size or tuple(inputs)), slices.total),
        output_sizes=slices if entry.kind == "linear" else None,
        weight=weight or entry.weight,
        sharding=whole,
        weight_shardings=by_weight,
    )
    return OUT_OF_TREE[by]


def unregister_oot(by: type[nn.Module]) -> None:
    """Undo `register_oot(..., by)`. Raises ConfigError if `by` replaces no class."""
    if by not in OUT_OF_TREE:
        name = getattr(by, "__qualname__", repr(by))
        known = [cls.__qualname__ for cls in OUT_OF_TREE]
        raise ConfigError(f"{name} replaces no class{nearest(name, known)}")
    del OUT_OF_TREE[by]


@dataclass(frozen=True)
class _Size:
    """Reads a size by function, by attribute, or by the first of several that is there."""

    source: Any

    def __call__(self, module: nn.Module) -> Any:
        if callable(self.source):
            return self.source(module)
        found = (self.source,) if isinstance(self.source, str) else self.source
        names = [name for name in found if isinstance(name, str)]
        for name in names:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(
            f"{type(module).__qualname__} has no {' or '.join(dict.fromkeys(names))}; say which "
            "attributes hold the sizes: register_oot(..., input_size=, output_sizes=)"
        )


@dataclass(frozen=True)
class _Slices(_Size):
    """Sizes of the output slices; one int is one slice."""

    def __call__(self, module: nn.Module) -> tuple[int, ...]:
        value = super().__call__(module)
        return (value,) if isinstance(value, int) else tuple(value)

    def total(self, module: nn.Module) -> int:
        return sum(self(module))
