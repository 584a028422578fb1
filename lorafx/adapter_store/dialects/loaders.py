"""diffusers' conversions of the names of a model's first implementation, and what they leave out.

factors ─▶ a loader's `lora_state_dict` ─▶ factors under diffusers' names
    └─ which of them each operation reads ─▶ s of each result, and those that none was made of

A changed weight goes through it as factors of rank one, and stands where these come out unchanged.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from inspect import getattr_static
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lorafx.adapter_store.dialects.module_paths import ModulePaths
from lorafx.adapter_store.dialects.spelling import DENOISERS, NamedTensor, Scales, spelt
from lorafx.adapter_store.peft_keys import factor_sizes
from lorafx.adapter_store.saved import AdapterState
from lorafx.errors import CheckpointError, UnsupportedAdapterError, some
from lorafx.progress import LOG
from lorafx.torch_internals.graph_parts import tree_leaves

#: Conversions scan all keys, some once per key.
_MOST_KEYS = 20_000
#: The spellings that conversions expect: prefix, leaves of A and B.
_EXPECTED = (
    ("diffusion_model.", {"A": "lora_A.weight", "B": "lora_B.weight"}),
    ("lora_unet_", {"A": "lora_down.weight", "B": "lora_up.weight"}),
)


def converted(
    parts: Sequence[NamedTensor],
    scales: Scales,
    model: Any,
    names: ModulePaths,
    direct: AdapterState,
    assemble: Callable[[Sequence[NamedTensor], Scales], AdapterState],
) -> AdapterState:
    """diffusers' conversion of the factors `parts`, if it makes factors of modules of `model` only;
    `direct` if none makes more of these than it has. CheckpointError for ambiguous conversions,
    and for modules that the model lacks; UnsupportedAdapterError for incomplete ones."""
    own = [part for part in parts if part.component in ("", *DENOISERS)]
    elsewhere = {part.component for part in parts} - {part.component for part in own}
    states: dict[str, AdapterState] = {}
    best, foreign = _fitting(direct, names), ""
    weights = {part.place: part for part in own if part.letter == "W"}
    keys = {part.key for part in own}
    factors = [factor for part in own for factor in _stand_ins(part)]
    for variant in _variants(factors) if 0 < len(own) <= _MOST_KEYS else ():
        for loader, of_factors, absent in _conversions(variant, model):
            made, lost = _with_weights(of_factors, weights)
            lost = (*(key for key in absent if key in keys), *lost)
            sources = _sources(made)
            scale_of = {place: {scales.get(p.place) for p in of} for place, of in sources.items()}
            if any(len(found) > 1 for found in scale_of.values()):
                continue  # factors with different scales are made into one
            single = {place: next(iter(found), None) for place, found in scale_of.items()}
            try:
                state = assemble([part for part, _ in made], single)
            except Exception:  # of names of other models
                continue
            missing, fitting = names.lost(state), _fitting(state, names)
            if missing and fitting > best:
                saved = {p.module: p.place for p, _ in made}
                of = {path: some(p.module for p in sources[saved[path]]) for path in missing}
                foreign = some(f"{path} ({name})" for path, name in of.items())
                best = fitting
            elif fitting and not missing and not any(_equal(state, s) for s in states.values()):
                left_out = tuple(sorted({*state.left_out, *elsewhere}))
                states[loader] = replace(state, left_out=left_out, lost=lost)
        if any(not state.lost for state in states.values()):
            break
    fewest = min((len(state.lost) for state in states.values()), default=0)
    states = {name: state for name, state in states.items() if len(state.lost) == fewest}
    if len(states) > 1:
        raise CheckpointError(
            f"diffusers converts these names in different ways for this model ({', '.join(states)}"
            "); convert the adapter by the pipeline that it is for, and save it again"
        )
    lost_keys = {key for state in states.values() for key in state.lost}
    kinds = {"m": "is of DoRA", "W": "changes all of a weight", "b": "is a bias"}
    for part in own:
        if part.letter in kinds and states and (part.letter == "m" or part.key in lost_keys):
            raise UnsupportedAdapterError(
                f"{part.key} {kinds[part.letter]}, which diffusers' conversion of these names "
                "leaves out or splits; save the adapter under the names that diffusers has for the "
                "model, or merge it into a copy of the base model"
            )
    if foreign and not states:
        raise CheckpointError(
            f"{direct.where}: diffusers' conversion of its names makes factors for {best} modules "
            f"of this model, and for some that it does not have: {foreign}. Load it into the model "
            "that it was made for, or leave these out by AdapterSource(..., ignore=[...])"
        )
    for state in states.values():
        LOG.info("adapter in %s: its names were converted by diffusers", direct.where)
        return state
    return direct


def _fitting(state: AdapterState, names: ModulePaths) -> int:
    """The number of modules with factors that the model has."""
    return len(factor_sizes(state.tensors)) - len(names.lost(state))


def _equal(first: AdapterState, second: AdapterState) -> bool:
    if first.tensors.keys() != second.tensors.keys() or first.scales != second.scales:
        return False
    pairs = ((t, second.tensors[key]) for key, t in first.tensors.items())
    return all(a is b or (not (a.is_meta or b.is_meta) and torch.equal(a, b)) for a, b in pairs)


def _variants(parts: Sequence[NamedTensor]) -> Iterator[dict[str, NamedTensor]]:
    """The factors by their own keys, and by those that conversions expect, of which some need α:
    it is r, so that they scale nothing."""
    alphas = [
        part._replace(letter="alpha", tensor=torch.tensor(float(len(part.tensor))))
        for part in parts
        if part.letter == "A" and part.tensor.dim()
    ]
    yield {part.key: part for part in parts}
    for prefix, leaves in _EXPECTED:
        flat, keys = prefix.endswith("_"), {}
        for part in (*parts, *alphas) if flat else parts:
            path = part.module.replace(".", "_") if flat else part.module
            leaf = leaves.get(part.letter, part.letter)
            keys[f"{prefix}{path}.{leaf}"] = part
        if len(keys) == len(parts) + flat * len(alphas):  # else two keys have become one
            yield keys


def _stand_ins(part: NamedTensor) -> Iterator[NamedTensor]:
    """The factor; in the place of a changed weight two of rank one, for a weight of its size."""
    if part.letter != "W":
        yield part
        return
    n, k = (torch.arange(1.0, max(size, 1) + 1) for size in part.tensor.shape)
    for letter, tensor in (("A", k[None]), ("B", n[:, None])):
        key = part.key.removesuffix("lora_W.weight") + _EXPECTED[part.flat][1][letter]
        yield part._replace(key=key, letter=letter, tensor=tensor)


def _with_weights(
    made: Sequence[tuple[NamedTensor, list[NamedTensor]]], weights: Mapping[str, NamedTensor]
) -> tuple[list[tuple[NamedTensor, list[NamedTensor]]], tuple[str, ...]]:
    """`made` with the `weights`, by place, where their stand-ins are as they were, and the keys of
    others."""
    split = {
        source.place
        for part, of in made
        for source in of
        if not (len(of) == 1 and torch.equal(part.tensor, source.tensor))
    }
    result, placed = [], set[str]()
    for part, of in made:
        places = weights.keys() & {source.place for source in of}
        if not places:
            result.append((part, of))
        elif part.letter == "B" and not places & split:
            weight = weights[places.pop()]
            placed.add(weight.key)
            result.append((part._replace(key=weight.key, letter="W", tensor=weight.tensor), of))
    return result, tuple(part.key for part in weights.values() if part.key not in placed)


def _sources(
    made: Sequence[tuple[NamedTensor, Sequence[NamedTensor]]],
) -> dict[str, list[NamedTensor]]:
    """What the factors of each place were made of, a module once."""
    sources: dict[str, dict[str, NamedTensor]] = {}
    for part, of in made:
        sources.setdefault(part.place, {}).update((source.place, source) for source in of)
    return {place: list(of.values()) for place, of in sources.items()}


def _conversions(
    variant: Mapping[str, NamedTensor], model: Any
) -> Iterator[tuple[str, list[tuple[NamedTensor, list[NamedTensor]]], tuple[str, ...]]]:
    """What the loaders of pipelines with a model of this class make of these factors: the loader,
    its factors with what they were made of, and the keys of the file whose tensors are lost.
    Conversions that fail, or that change no name, are left out."""
    config = getattr(model, "config", None)  # a UNet's decides the numbers of blocks
    blocks = config if hasattr(config, "layers_per_block") else None
    for name, loader in _loaders_of(model.__class__):
        # Some scale in place.
        sources = {key: part.tensor.clone() for key, part in variant.items()}
        try:
            with _silence(), _Following(sources) as following:
                result = loader.lora_state_dict(dict(sources), unet_config=blocks)
            converted = result[0] if isinstance(result, tuple) else result
            of = {key: following.sources(tensor) for key, tensor in converted.items()}
        except Exception:  # conversions for other models may raise any exception
            continue
        if converted.keys() != variant.keys():
            made = [
                (spelt(k, t), [variant[source] for source in of[k]]) for k, t in converted.items()
            ]
            lost = sorted(variant.keys() - frozenset().union(*of.values()))
            yield name, made, tuple(variant[k].key for k in lost if variant[k].letter != "alpha")


@cache
def _loaders_of(model: Any) -> Sequence[tuple[str, Any]]:
    """The loaders of pipelines with such a model, and those of which none says what it is made of.
    Names alone do not tell one family from another."""
    try:
        loaders: Any = importlib.import_module("diffusers.loaders.lora_pipeline")
    except ImportError:
        return ()
    pipelines = _pipelines()
    found: dict[Any, tuple[str, Any]] = {}
    for name, loader in vars(loaders).items():
        conversion = isinstance(loader, type) and vars(loader).get("lora_state_dict")
        if not conversion:
            continue
        of = [p for p in pipelines if getattr_static(p, "lora_state_dict", None) is conversion]
        made = any(issubclass(model, tuple(pipelines[p])) for p in of or pipelines)
        if made == bool(of):
            found.setdefault(conversion, (name, loader))
    return tuple(found.values())


@cache
def _pipelines() -> Mapping[type, Collection[type]]:
    """All pipelines of diffusers, with the classes of their models."""
    package: Any = importlib.import_module("diffusers.pipelines")
    found: dict[type, Collection[type]] = {}
    for name in dir(package):
        try:
            with _silence():
                pipeline = getattr(package, name)
            hints = get_type_hints(getattr_static(pipeline, "__init__"))
        except Exception:  # what a pipeline imports may be absent
            continue
        types = [kind for hint in hints.values() for kind in (hint, *get_args(hint))]
        models = [kind for kind in types if isinstance(kind, type) and issubclass(kind, nn.Module)]
        if models:
            found[pipeline] = models
    return found


@contextmanager
def _silence() -> Iterator[None]:
    logs = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


class _Following(TorchFunctionMode):
    """Notes of which `sources` each tensor in the block is made."""

    def __init__(self, sources: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._keys: Any = WeakTensorKeyDictionary()
        for key, tensor in sources.items():
            self._keys[tensor] = frozenset([key])

    def sources(self, tensors: Any) -> frozenset[str]:
        """The keys of the sources of these, at any depth of tuples and dicts."""
        leaves = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
        return frozenset().union(*(self._keys.get(leaf, ()) for leaf in leaves))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        keys = self.sources((args, kwargs))
        written = args[0] if result is None and args else result
        for leaf in tree_leaves(written) if keys else ():
            for tensor in (leaf, leaf._base) if isinstance(leaf, Tensor) else ():
                if tensor is not None:  # what a written tensor is a view of is written, too
                    self._keys[tensor] = self._keys.get(tensor, frozenset()) | keys
        return result
