"""Adapters as the readers take them: opened, in a known dialect, under PEFT's names.

    source ─▶ Saved ─▶ dialect ─▶ key_mapping, or moved paths ─▶ AdapterState

An adapter of a text model may be meant for a model that contains the text model:

    model.layers.0.self_attn.q_proj   →   model.language_model.layers.0.self_attn.q_proj

Without a `key_mapping`, lost paths are looked up below another beginning, the same for all, with
weights of their sizes; several candidates are an error.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.adapter_store.dialects.all_dialects import dialect_of
from lorafx.adapter_store.peft_keys import factor_sizes, parse, without_prefix
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterSource, AdapterState, opened
from lorafx.errors import CheckpointError, ConfigError, LorafxWarning
from lorafx.model.module_graph import join
from lorafx.model.saved_names import without_compiled
from lorafx.progress import LOG


def load_state(source: Any, model: nn.Module | None = None, *, warn: bool = True) -> AdapterState:
    """Configuration and tensors of `source`, in PEFT's names.

    `source` is an `AdapterSource`, a valid `source` of it, or an `AdapterState`, which is returned.
    `model` resolves flattened names and tells embeddings from linears. `warn` is about factors for
    other models of a pipeline. Raises CheckpointError and UnsupportedAdapterError.
    """
    if isinstance(source, AdapterState):
        return source
    given = source if isinstance(source, AdapterSource) else AdapterSource(source)
    saved = opened(given)
    state = dialect_of(saved, given.dialect).state(saved, model)
    if model is not None:
        state = _expanded(state, model)
    if given.key_mapping:
        state = _mapped(state, given.key_mapping)
    elif model is not None:
        state = _moved(state, model)
    if warn and state.left_out and given.component is None:
        warnings.warn(
            f"{state.where} has factors for other models of a pipeline too "
            f"({', '.join(state.left_out)}), which are not used here: load it into those as well, "
            "or say AdapterSource(..., component=...)",
            LorafxWarning,
            stacklevel=2,
        )
    for note in state.notes:
        LOG.info("adapter in %s: %s", state.where, note)
    return state


def _expanded(state: AdapterState, model: nn.Module) -> AdapterState:
    """`state` with BD-LoRA's blocks, A (r, K/n) or B (N, r/n), on a diagonal."""
    settings = state.config.block_diagonal
    if settings is None or settings.blocks == 1:
        return state
    places = Places((), model)
    largest = max((parameter.numel() for parameter in model.parameters()), default=0)
    tensors = dict(state.tensors)
    for key, tensor in state.tensors.items():
        factor = parse(key)
        if factor is None or factor.letter != settings.letter(without_prefix(factor.module)):
            continue
        weight = getattr(places.meaning(factor.module), "weight", None)
        size = weight.numel() if isinstance(weight, Tensor) else largest
        divides = tensor.dim() == 2 and len(tensor) > 0 and len(tensor) % settings.blocks == 0
        if divides and tensor.numel() * settings.blocks <= size:
            tensors[key] = torch.block_diag(*tensor.chunk(settings.blocks))
    return replace(state, tensors=tensors)


def _mapped(state: AdapterState, mapping: Mapping[str, str]) -> AdapterState:
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            "key_mapping maps regular expressions to what takes the place of their matches, "
            f"{{pattern: replacement}}; got {mapping!r:.80}"
        )
    patterns: list[tuple[re.Pattern[str], str]] = []
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


def _moved(state: AdapterState, model: nn.Module) -> AdapterState:
    places = Places((), model)
    heads: dict[str, bool] = {}

    def is_lost(path: str) -> bool:
        """Whether the model lacks the whole list of layers, not just one of them."""
        head = _head(path)
        if head not in heads:
            heads[head] = places.meaning(path) is None and places.meaning(head) is None
        return heads[head]

    lost: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.tensors.items():
        factor = parse(key)
        path = "" if factor is None else without_prefix(factor.module)
        if factor is not None and path and is_lost(path):
            lost.setdefault(path, {})[factor.letter] = tensor
    found = _new_beginning(lost, model, state.where) if lost else None
    if found is None:
        return state
    old, new = found

    def rename(path: str) -> str:
        begins = not old or path == old or path.startswith(f"{old}.")
        if not begins or not is_lost(path):
            return path
        return join(new, path.removeprefix(old).removeprefix("."))

    note = f"{old or 'its root'} is {new} in this model"
    return replace(_renamed(state, rename), notes=(*state.notes, note))


def _head(path: str) -> str:
    """`path` before its first number (its list of layers); without a number, `path`."""
    return re.split(r"(?:^|[.])\d+(?:[.]|$)", path, maxsplit=1)[0]


def _new_beginning(
    lost: Mapping[str, Mapping[str, Tensor]], model: nn.Module, where: str
) -> tuple[str, str] | None:
    """The common beginning of the lost paths, and what has modules of their sizes in its place."""
    known = {without_compiled(path): module for path, module in model.named_modules()}
    first = next(iter(lost)).split(".")
    for cut in range(len(first) - 1):
        old, end = ".".join(first[:cut]), ".".join(first[cut:])
        common = all(not old or path.startswith(f"{old}.") for path in lost)
        if not common or _head(end) in ("", end):  # the end has to name a list of layers
            break
        starts = [path.removesuffix(end) for path in known if f".{path}".endswith(f".{end}")]
        ends = {path.removeprefix(old).removeprefix("."): factors for path, factors in lost.items()}
        fitting = [
            start.removesuffix(".")
            for start in starts
            if all(_fits(known.get(start + end), factors) for end, factors in ends.items())
        ]
        if len(fitting) > 1:
            raise CheckpointError(
                f"{where}: {old or 'the root'} of the model that it was made for may be "
                f"{' or '.join(fitting)} here; say which by AdapterSource(..., key_mapping="
                f"{{'^{old}': '{fitting[0]}'}})"
            )
        if fitting:
            return old, fitting[0]
    return None


def _fits(module: nn.Module | None, factors: Mapping[str, Tensor]) -> bool:
    if module is None:
        return False
    weight = getattr(module, "weight", None)
    matrices = {letter: f for letter, f in factors.items() if f.dim() == 2}
    sizes = [f.shape[-1 if letter == "A" else 0] for letter, f in matrices.items()]
    return not isinstance(weight, Tensor) or (
        weight.dim() == 2 and all(size in weight.shape for size in sizes)
    )


def _renamed(state: AdapterState, rename: Callable[[str], str]) -> AdapterState:
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    origin: dict[str, str] = {}
    sizes = factor_sizes(state.tensors)
    for key, tensor in state.tensors.items():
        factor = parse(key)
        owner = key.rpartition(".")[0] if factor is None else factor.module
        path, ending = without_prefix(owner), key[len(owner) :]
        target = rename(path)
        new = f"{target}{ending}"
        first = origin.setdefault(new, key)
        if first != key and (target != path or first not in tensors):
            raise CheckpointError(f"{state.where}: {first} and {key} both become {new}; keep one")
        tensors[key if target == path else new] = tensor
        if factor is not None and factor.letter == "A":
            scale = _scale(state, path, sizes[factor.module].rank)
            if scale is not None:
                scales[target] = scale
    return replace(state, tensors=tensors, scales=scales)


def _scale(state: AdapterState, path: str, rank: int) -> float | None:
    """s of the module saved as `path`, where patterns would not match its new name."""
    config = state.config
    if path in state.scales or not (config.rank_pattern or config.alpha_pattern):
        return state.scales.get(path)
    rank = config.rank(path) or rank
    return config.scale(path, rank) if rank else None
