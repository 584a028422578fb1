"""Modules that moved: an adapter of a text model on a model that holds the text model.

    model.layers.0.self_attn.q_proj   →   model.language_model.layers.0.self_attn.q_proj

`key_mapping` says it by regular expressions, as in transformers' `from_pretrained`. Without it, the
paths of a file that lead nowhere from their first names on are looked for as the ends of the
model's own paths: all that begin alike have to be in one place, with weights of their sizes. One
such place is taken and said; several are an error.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from lorafx.adapter_store.peft_keys import factor_sizes, parse, without_prefix
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterState
from lorafx.errors import CheckpointError, ConfigError
from lorafx.model.module_graph import join
from lorafx.model.saved_names import without_compiled

#: Paths of a group that are looked for among the model's, until one is there: others are packed.
_MOST_TRIED = 32


def mapped(state: AdapterState, mapping: Mapping[str, str]) -> AdapterState:
    """`state` with its paths renamed by regular expressions, each where the one before has left it.

    Raises:
        ConfigError: an expression is none, or none of them matches a path.
        CheckpointError: two keys become one.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            "key_mapping maps regular expressions to what takes the place of their matches, "
            f"{{pattern: replacement}}; got {mapping!r:.80}"
        )
    patterns = []
    for pattern, target in mapping.items():
        try:
            patterns.append((re.compile(pattern), target))
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"key_mapping: {pattern!r} is no regular expression: {error}"
            ) from None

    def rename(path: str) -> str:
        for pattern, target in patterns:
            try:
                path = pattern.sub(target, path)
            except (re.error, IndexError, TypeError) as error:
                raise ConfigError(
                    f"key_mapping: {pattern.pattern!r} cannot become {target!r}: {error}"
                ) from None
        return path

    found = _renamed(state, rename)
    if found.tensors.keys() == state.tensors.keys():
        first = without_prefix(next(iter(state.tensors), ""))
        raise ConfigError(
            f"key_mapping matches no path in {state.where}, whose first key is {first!r}"
        )
    return found


def moved(state: AdapterState, model: nn.Module) -> AdapterState:
    """`state` with its paths where the model has them now, where that is plain to see.

    Raises:
        CheckpointError: there are several such places.
    """
    places, elsewhere = Places((), model), dict[str, bool]()

    def is_lost(path: str) -> bool:
        head = _head(path)
        if head not in elsewhere:
            elsewhere[head] = places.meaning(path) is None and _unreached(places, path)
        return elsewhere[head]

    lost: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in state.tensors.items():
        factor = parse(key)
        path = "" if factor is None else without_prefix(factor.module)
        if factor is not None and path and is_lost(path):
            group = lost.setdefault(path.partition(".")[0], {})
            group.setdefault(path, {})[factor.letter] = tensor
    renamings: dict[str, str] = {}
    for group in lost.values():
        found = _moved_group(group, model, state.where)
        if found is not None:
            renamings.update([found])
    if not renamings:
        return state
    notes = tuple(f"{old or 'its root'} is {new} in this model" for old, new in renamings.items())

    def rename(path: str) -> str:
        for old, new in renamings.items():
            begins = not old or path == old or path.startswith(f"{old}.")
            if begins and is_lost(path):
                return join(new, path.removeprefix(old).removeprefix("."))
        return path

    return replace(_renamed(state, rename), notes=(*state.notes, *notes))


def _head(path: str) -> str:
    """`path` before its first number: what lies in one list of layers is there or not as a whole.
    Without a number, the path."""
    names = path.split(".")
    at = next((i for i, name in enumerate(names) if name.isdigit()), len(names))
    return ".".join(names[:at])


def _unreached(places: Places, path: str) -> bool:
    """Whether the model's modules end before the first number in `path`: the list of layers that it
    names is elsewhere. A layer that is lacking, or a part of one, did not move."""
    names = places.current(path).split(".")
    known: nn.Module | None = places.model
    for name in names:
        known = known._modules.get(name) if known is not None else None
        if known is None:
            return not name.isdigit()
        if name.isdigit():
            return False
    return False


def _moved_group(
    group: Mapping[str, Mapping[str, Tensor]], model: nn.Module, where: str
) -> tuple[str, str] | None:
    """(old, new) beginning of the paths in `group`, which share their first name."""
    known = {without_compiled(path): module for path, module in model.named_modules()}
    paths = [path.split(".") for path in group]
    shared = 0
    while all(len(p) > shared + 2 and p[shared] == paths[0][shared] for p in paths):
        shared += 1
    for cut in range(shared + 1):
        if not any(name.isdigit() for name in paths[0][cut:]):
            break
        ends = {path: ".".join(path.split(".")[cut:]) for path in group}
        tried = itertools.islice(ends.values(), _MOST_TRIED)
        starts = next((found for end in tried if (found := _starts(end, known))), [])
        fit: list[str] = []
        for whole in (True, False):
            found = [start for start in starts if _fit(start, whole, ends, group, known)]
            fit = fit or found
        old = ".".join(paths[0][:cut])
        if len(fit) > 1:
            raise CheckpointError(
                f"{where}: {old or 'the root'} of the model that it was made for may be "
                f"{' or '.join(fit)} here; say which by AdapterSource(..., key_mapping="
                f"{{'^{old}': '{fit[0]}'}})"
            )
        if fit:
            return old, fit[0]
    return None


def _starts(end: str, known: Iterable[str]) -> list[str]:
    """What stands before `end` in the paths that end so."""
    found = (path[: len(path) - len(end)] for path in known if f".{path}".endswith(f".{end}"))
    return [start.removesuffix(".") for start in found]


def _fit(
    start: str,
    whole: bool,
    ends: Mapping[str, str],
    group: Mapping[str, Mapping[str, Tensor]],
    known: Mapping[str, nn.Module],
) -> bool:
    """Whether all paths of a group are below `start`, with weights of their sizes; or, unless
    `whole`, those that are modules there, and the layers of the others: they may be packed, or
    experts."""
    for path, end in ends.items():
        module = known.get(join(start, end))
        if module is not None:
            if not _fits(module, group[path]):
                return False
        elif whole or not _layer_of(join(start, end), known):
            return False
    return True


def _layer_of(path: str, known: Mapping[str, nn.Module]) -> bool:
    """Whether the first numbered module on the way to `path` exists."""
    head = _head(path)
    number = path.removeprefix(head).removeprefix(".").partition(".")[0]
    return bool(number) and join(head, number) in known


def _fits(module: nn.Module, factors: Mapping[str, Tensor]) -> bool:
    """Whether a module has a weight of the sizes of these factors."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return True
    if weight.dim() != 2:
        return False
    a, b = factors.get("A"), factors.get("B")
    sizes = [a.shape[-1]] * (a is not None) if a is not None and a.dim() == 2 else []
    sizes += [b.shape[0]] if b is not None and b.dim() == 2 else []
    return all(size in weight.shape for size in sizes)


def _renamed(state: AdapterState, rename: Callable[[str], str]) -> AdapterState:
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    origin: dict[str, str] = {}
    sizes = factor_sizes(state.tensors)
    for key, tensor in state.tensors.items():
        factor = parse(key)
        owner = key.rpartition(".")[0] if factor is None else factor.module
        path, begin = without_prefix(owner), key[len(owner) :]
        target = rename(path)
        new = f"{target}{begin}"
        first = origin.setdefault(new, key)
        if first != key and (target != path or first not in tensors):
            raise CheckpointError(f"{state.where}: {first} and {key} both become {new}; keep one")
        tensors[key if target == path else new] = tensor
        if factor is not None and factor.letter == "A":
            scale = _scale(state, path, sizes[factor.module].rank)
            scales.update({} if scale is None else {target: scale})
    return replace(state, tensors=tensors, scales=scales)


def _scale(state: AdapterState, path: str, rank: int) -> float | None:
    """s of the module that was saved as `path`, where patterns would not know its new name."""
    config = state.config
    if path in state.scales or not (config.rank_pattern or config.alpha_pattern):
        return state.scales.get(path)
    rank = config.rank(path) or rank
    return config.scale(path, rank) if rank else None
