"""Which paths a target specification names, by PEFT's rules.

    str           re.fullmatch(spec, path), against a clock
    "all-linear"  every eligible linear module but the output embedding (any letter case)
    list          path == entry, or path ends with "." + entry

A module with several paths is named when one of them is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property

from torch import nn

from lorafx.errors import ConfigError, nearest
from lorafx.model.patterns import PatternError, pattern

ALL_LINEAR = "all-linear"


class Entries(tuple[str, ...]):
    """Module names and dotted suffixes of paths. A model has thousands of modules and a list may
    have as many entries, so they are looked up by what a path ends with."""

    @cached_property
    def as_set(self) -> frozenset[str]:
        return frozenset(self)


class SavedTargets(Entries):
    """Modules that a checkpoint names. Where an entry is the path of a module it names that one
    alone: a head called `output` does not stand for every `attention.output`."""


class AdapterNames(SavedTargets):
    """What the given adapters name, where the user names no modules: then no module of the model
    was left out by anybody."""


def is_all_linear(spec: str | Sequence[str] | None) -> bool:
    """Whether `spec` stands for all linear modules."""
    return isinstance(spec, str) and spec.lower() == ALL_LINEAR


def checked(spec: str | Collection[str] | None, field: str) -> str | tuple[str, ...] | None:
    """`spec` as a str, a tuple of str or None.

    Raises:
        ConfigError: another type, or a str that is no regular expression, or one
            that is too large (lorafx.model.patterns).
    """
    if spec is None:
        return None
    if isinstance(spec, str):
        try:
            pattern(spec)
        except PatternError as error:
            raise ConfigError(f"{field}={spec!r:.120} {error}") from error
        return spec
    if not isinstance(spec, Collection) or not all(isinstance(entry, str) for entry in spec):
        raise ConfigError(
            f"{field} must be a list of module names, one regular expression or "
            f"{ALL_LINEAR!r}, got {spec!r}"
        )
    return spec if isinstance(spec, Entries) else Entries(spec)


def suffixes(path: str) -> Iterator[str]:
    """The entries of a list that name `path`: itself and its dotted suffixes."""
    while True:
        yield path
        _, dot, path = path.partition(".")
        if not dot:
            return


def names(spec: str | Sequence[str], paths: Iterable[str]) -> bool:
    """Whether `spec` (not "all-linear") names a module that these paths reach."""
    if isinstance(spec, str):
        return any(map(pattern(spec).fullmatches, paths))
    index = spec.as_set if isinstance(spec, Entries) else frozenset(spec)
    return any(suffix in index for path in paths for suffix in suffixes(path))


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that maps to the vocabulary, for models that say which one it is.

    PEFT leaves it out of "all-linear". Models of other libraries have no such method, and some
    inherit one that their class does not answer.
    """
    ask = getattr(model, "get_output_embeddings", None)
    if not callable(ask):
        return None
    try:
        return ask()
    except NotImplementedError:
        return None


def nearest_targets(entry: str, paths: Iterable[str]) -> str:
    """A sentence fragment with the names closest to `entry` among the eligible modules.

    Undotted entries are compared with last names, of which a model has few.
    """
    if "." in entry:
        return nearest(entry, paths)
    return nearest(entry, dict.fromkeys(path.rpartition(".")[2] for path in paths))
