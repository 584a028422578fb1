"""Classes that replace a registered one without inheriting from it.

    register_oot(QKVParallelLinear, MyQKV):   lookup(MyQKV(...)) = lookup(QKVParallelLinear(...)),
                                              with the sizes and the weight that MyQKV offers

What a class offers is read from the class when it is registered: attributes, properties,
annotations, and the attributes that its constructor and the methods that this calls store on
`self`. Instances are checked again where they are selected.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import CodeType
from typing import Any

from torch import nn

from lorafx.errors import ConfigError, nearest
from lorafx.registry import (
    REPLACEMENTS,
    Eligible,
    FeatureSizes,
    Replacement,
    Sharding,
    SizeOf,
    SizesOf,
    lookup_class,
    own_entry,
)

_LOADS = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_REGISTRATIONS = frozenset({"register_parameter", "register_buffer"})
#: What may follow `self` without handing it to other code.
_KEEPS_SELF = _LOADS | {"STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR"}


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
    this one.

    Args:
        replaced: a class that is registered, or inherits from one that is.
        by: the class that takes its place and need not inherit from it. Its forward computes the
            same product.
        input_size: attribute or function giving K; by default `input_size`, or what `replaced`
            calls it. For embeddings `num_embeddings`.
        output_sizes: attribute or function giving the columns of each output slice; by default
            `output_sizes`, or `output_size` for one slice, or what `replaced` calls it. For
            embeddings `embedding_dim`.
        weight: attribute that holds W; by default that of `replaced`, or `weight`.
        sharding: for tensor-parallel classes, as in `register`; sizes are then those of this rank.

    Returns:
        The entry that instances of `by` have.

    Raises:
        ConfigError: `by` does not offer its sizes or weight, one of the two is not a module class,
            `replaced` is not registered, or `by` is already registered.
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
    if by not in REPLACEMENTS and own_entry(by) is not None:
        raise ConfigError(
            f"{call}: {by.__qualname__} is already registered; call lorafx.unregister for it first"
        )
    if by in _replaced_by(replaced):
        raise ConfigError(f"{call}: {replaced.__qualname__} already replaces {by.__qualname__}")
    wanted = _Wanted(entry, _Offer(by))
    sizes, slices = wanted.input_size(input_size), wanted.output_sizes(output_sizes)
    replacement = Replacement(
        replaced,
        by,
        FeatureSizes(sizes, slices.total),
        slices if entry.kind == "linear" else None,
        wanted.weight(weight),
        sharding,
    )
    if wanted.lacking:
        raise ConfigError(
            f"{call}: {by.__qualname__} lacks {', '.join(wanted.lacking)}; say which attributes "
            "hold them (input_size=, output_sizes=, weight=), and annotate on the class those that "
            "other code sets"
        )
    REPLACEMENTS[by] = replacement
    found = own_entry(by)
    assert found is not None
    return found


def unregister_oot(by: type[nn.Module]) -> None:
    """Undo `register_oot(..., by)`.

    Raises:
        ConfigError: `by` replaces no class.
    """
    if by not in REPLACEMENTS:
        name = getattr(by, "__qualname__", repr(by))
        known = [cls.__qualname__ for cls in REPLACEMENTS]
        raise ConfigError(f"{name} replaces no class{nearest(name, known)}")
    del REPLACEMENTS[by]


def _replaced_by(cls: type) -> Iterator[type]:
    """The classes that `cls` has its entry from, one replacing the next."""
    while True:
        cls = next(base for base in cls.__mro__ if own_entry(base) is not None)
        yield cls
        if cls not in REPLACEMENTS:
            return
        cls = REPLACEMENTS[cls].replaced


@dataclass(frozen=True)
class _Slices:
    """Sizes of the output slices by attribute or function; one int is one slice."""

    sizes: SizesOf

    def __call__(self, module: nn.Module) -> tuple[int, ...]:
        value: Any = (
            getattr(module, self.sizes) if isinstance(self.sizes, str) else self.sizes(module)
        )
        return (value,) if isinstance(value, int) else tuple(value)

    def total(self, module: nn.Module) -> int:
        return sum(self(module))


@dataclass
class _Wanted:
    """Picks what an entry needs from what a class offers, and notes what is not there."""

    entry: Eligible
    offer: _Offer
    lacking: list[str] = field(default_factory=list)

    def input_size(self, given: SizeOf | None) -> SizeOf:
        names = ["num_embeddings" if self.entry.kind == "embedding" else "input_size"]
        return self._pick(given, [*names, *self._own("in_features")])

    def output_sizes(self, given: SizesOf | None) -> _Slices:
        names = ["embedding_dim"] if self.entry.kind == "embedding" else ["output_sizes"]
        if not self.entry.packed:
            names += ["output_size", *self._own("out_features")]
        return _Slices(self._pick(given, names))

    def weight(self, given: str | None) -> str:
        name = given or (self.entry.weight if self.offer.has(self.entry.weight) else "weight")
        if not self.offer.has(name) and not self.offer.shares_self:
            self.lacking.append(given or _either([self.entry.weight, "weight"]))
        return name

    def _own(self, which: str) -> list[str]:
        """The attribute that the replaced class has a size in, where it is one."""
        own = getattr(self.entry.sizes, which, None)
        return [own] if isinstance(own, str) else []

    def _pick(self, given: Any, names: Sequence[str]) -> Any:
        """`given`, or the first of `names` that is offered."""
        if given is not None and not isinstance(given, str):
            return given
        names = names if given is None else [given]
        found = next((name for name in names if self.offer.has(name)), None)
        if found is None:
            self.lacking.append(_either(names))
        return found or names[0]


def _either(names: Sequence[str]) -> str:
    return " or ".join(dict.fromkeys(names))


class _Offer:
    """The attributes that instances of a class have, as far as the class tells.

    Attributes:
        shares_self: the constructor hands `self` to other code, which may set more of them (a
            quantisation method that creates the weight).
    """

    def __init__(self, cls: type[nn.Module]) -> None:
        # nn.Module's own attributes are no sizes, and its constructor shares nothing of interest.
        self.bases = [base for base in cls.__mro__ if base not in (nn.Module, object)]
        self.names: set[str] = set()
        self.shares_self = False
        self.answers_anything = any("__getattr__" in vars(base) for base in self.bases)
        for base in self.bases:
            self.names.update(vars(base), inspect.get_annotations(base))
        self._read: set[str] = set()
        self._read_method("__init__")

    def has(self, name: str) -> bool:
        return name in self.names or self.answers_anything

    def _read_method(self, name: str) -> None:
        """Note what the methods of this name store, and those that they call on `self`."""
        if name in self._read:
            return
        self._read.add(name)
        for base in self.bases:
            method = inspect.unwrap(vars(base).get(name, None))
            code = getattr(method, "__code__", None)
            if isinstance(code, CodeType) and code.co_argcount:
                self._read_code(code, code.co_varnames[0])

    def _read_code(self, code: CodeType, this: str) -> None:
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for index, (step, after) in enumerate(pairwise(steps)):
            if step.opname == "LOAD_CLOSURE" or not _loads(step, this):
                continue
            if after.opname == "STORE_ATTR":
                self.names.add(after.argval)
            elif after.opname in _LOADS:
                if after.argval in _REGISTRATIONS and index + 2 < len(steps):
                    self.names.add(str(steps[index + 2].argval))
                self._read_method(after.argval)
            elif after.opname not in _KEEPS_SELF:
                self.shares_self = True
                if index and steps[index - 1].argval == "setattr":
                    self.names.add(str(after.argval))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._read_code(constant, this)


def _loads(step: dis.Instruction, this: str) -> bool:
    """Whether the instruction leaves `self` on top of the stack; some load two names at once."""
    last = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
    return "LOAD" in step.opname and last == this
