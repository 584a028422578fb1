"""Paths of adapters that the model has under another prefix.

An adapter of a text model may be meant for a model that contains the text model:

    model.layers.0.self_attn.q_proj   →   model.language_model.layers.0.self_attn.q_proj

Names and sizes alone do not say so: towers of a model, and models of a family, have layers of the
same names and sizes. So a prefix is exchanged by itself where transformers names both: the model's
`base_model_prefix`, and the containers of its language model. Any other is for the caller to say
(`AdapterSource.prefix`, `key_mapping`).
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lorafx.adapter_store.peft_keys import parse, without_prefix
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterSource, AdapterState, Made
from lorafx.errors import CheckpointError, ConfigError
from lorafx.model.saved_names import WRAPPERS, without_compiled
from lorafx.progress import LOG
from lorafx.torch_internals.transformers_parts import classes_of

#: What transformers calls the language model in a larger one, as in its `set_decoder`.
_CONTAINERS = ("language_model", "text_model")


def with_present_paths(
    state: AdapterState, adapter: AdapterSource, model: nn.Module | None
) -> AdapterState:
    """`state` by the paths that the prefix and the `key_mapping` of `adapter` make, or else by
    those of `model`. Raises ConfigError for mappings that are wrong, CheckpointError for modules
    whose new place is not certain."""
    mapping: Mapping[str, str] = {}
    if adapter.prefix is not None:
        mapping = _exchanging(*_prefixes(adapter.prefix))
    if adapter.key_mapping:
        mapping = {**mapping, **_checked(adapter.key_mapping)}
    elif model is not None and not mapping:
        mapping = _mapping_of_moved(state, model)
    return _with_mapped_keys(state, mapping) if mapping else state


def _prefixes(prefix: Any) -> tuple[str, str]:
    pair = (prefix, "") if isinstance(prefix, str) else prefix
    if not isinstance(pair, (tuple, list)) or list(map(type, pair)) != [str, str]:
        raise ConfigError(
            "prefix is the path in the files of what this model is, or (path in the files, path "
            f"here); got {prefix!r:.80}"
        )
    old, new = (path.strip(".") for path in pair)
    return old, new


def _exchanging(old: str, new: str) -> dict[str, str]:
    """The `key_mapping` from paths below `old` to those below `new`."""
    return {rf"^{re.escape(old)}\." if old else "^": f"{new}." if new else ""}


def _mapping_of_moved(state: AdapterState, model: nn.Module) -> Mapping[str, str]:
    """The `key_mapping` of the common prefix of paths that the model lacks to the only prefix below
    which it has modules of their sizes; {} if there is none. CheckpointError for several, and for
    one that nothing but names and sizes tells."""
    places = Places((), model)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.tensors.items():
        if (factor := parse(key)) is not None:
            factors.setdefault(without_prefix(factor.module), {})[factor.letter] = tensor
    known = {without_compiled(path): module for path, module in model.named_modules()}
    lost = {p: pair for p, pair in factors.items() if p not in known and places.meaning(p) is None}
    first_path = next(iter(lost), "").split(".")
    for cut in range(len(first_path) - 1):
        old, end = (".".join(part) for part in (first_path[:cut], first_path[cut:]))
        old_prefix = old and f"{old}."
        if {path for path in factors if path.startswith(old_prefix)} != lost.keys():
            continue
        new_prefixes = [
            new
            for new in (p.removesuffix(end) for p in known if f".{p}".endswith(f".{end}"))
            if _same_entries(old, new)
            and all(_fits(known.get(new + p.removeprefix(old_prefix)), lost[p]) for p in lost)
        ]
        labels = [new.removesuffix(".") for new in new_prefixes]
        if not new_prefixes:
            continue
        way = f"AdapterSource(..., prefix=({old!r}, {labels[0]!r}))"
        if len(new_prefixes) > 1:
            raise CheckpointError(
                f"{state.where}: {old or 'the root'} of the model that it was made for may be "
                f"{' or '.join(labels)} here; say which by {way}"
            )
        if not _are_one_part(model, old, known[labels[0]]):
            raise CheckpointError(
                f"{state.where}: its {'.'.join(first_path)} would fit {new_prefixes[0]}{end} "
                "here by name and size alone, which another tower or another family has as well; "
                f"load it with the model that it was made for, or, if this is it, give {way}"
            )
        LOG.info("adapter in %s: %s is %s here", state.where, old or "its root", labels[0])
        return _exchanging(old, labels[0])
    return {}


def _are_one_part(model: nn.Module, old: str, part: nn.Module) -> bool:
    """Whether transformers names `part` of the model, and `old` in the model of an adapter, for the
    same: all of it, or its language model, with a head or without."""
    transformers: Any = sys.modules.get("transformers")
    found = () if transformers is None else model.modules()
    pretrained = [module for module in found if isinstance(module, transformers.PreTrainedModel)]
    if not pretrained or not set(pretrained) <= set(pretrained[0].modules()):
        return False
    parts, names = pretrained[:1], {*WRAPPERS, ""}
    text = pretrained[0].get_decoder() if hasattr(pretrained[0], "get_decoder") else None
    alone = transformers.AutoModelForCausalLM  # its models are language models and no more
    if isinstance(text, transformers.PreTrainedModel) and any(classes_of(alone, text.config)):
        parts.append(text)
        names.update(_CONTAINERS)
    names.update(module.base_model_prefix for module in parts)
    parts += [module.base_model for module in parts]
    return any(part is module for module in parts) and names.issuperset(old.split("."))


def _same_entries(old: str, new: str) -> bool:
    """Whether the numbers in two paths agree, from the end: layer 7 is never layer 0."""
    first, second = ([p for p in path.split(".") if p.isdecimal()][::-1] for path in (old, new))
    return all(map(operator.eq, first, second))


def _fits(module: nn.Module | None, factors: Mapping[str, Tensor]) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return module is not None
    sizes = [f.shape[-1 if letter == "A" else 0] for letter, f in factors.items() if f.dim() == 2]
    sizes = [size for size in sizes if size]  # an A of MiSS is made where its place is known
    return weight.dim() == 2 and all(size in weight.shape for size in sizes)


def _with_mapped_keys(state: AdapterState, mapping: Mapping[str, str]) -> AdapterState:
    rename = _renaming(mapping)
    tensors: dict[str, Tensor] = {}
    old_keys: dict[str, str] = {}
    paths: dict[str, str] = {}
    made: dict[str, Made] = {}
    for key, tensor in state.tensors.items():
        factor = parse(key)
        owner = key.rpartition(".")[0] if factor is None else factor.module
        path = without_prefix(owner)
        target = rename(path)
        new = f"{target}{key[len(owner) :]}"
        first = old_keys.setdefault(new, key)
        if first != key and (target != path or first not in tensors):
            raise CheckpointError(f"{state.where}: {first} and {key} both become {new}; keep one")
        new_key = key if target == path else new
        tensors[new_key] = tensor
        if key in state.made:
            made[new_key] = state.made[key]
        paths[target] = path
    if tensors.keys() == state.tensors.keys():
        first = without_prefix(next(iter(state.tensors), ""))
        raise ConfigError(
            f"key_mapping or prefix matches no path in {state.where}, whose first key is {first!r}"
        )
    scales = {new: state.scales[old] for new, old in paths.items() if old in state.scales}
    return replace(state, tensors=tensors, scales=scales, paths=paths, made=made)


def _checked(mapping: Any) -> Mapping[str, str]:
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            "key_mapping maps regular expressions to what takes the place of their matches, "
            f"{{pattern: replacement}}; got {mapping!r:.80}"
        )
    return mapping


def _renaming(mapping: Mapping[str, str]) -> Callable[[str], str]:
    def rename(path: str) -> str:
        for pattern, target in mapping.items():
            try:
                path = re.sub(pattern, target, path)
            except (re.error, IndexError, TypeError) as error:
                raise ConfigError(
                    f"key_mapping: {pattern!r} is no regular expression, or its matches cannot "
                    f"become {target!r}: {error}"
                ) from None
        return path

    return rename
