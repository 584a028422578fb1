"""Replaces the tensors of other methods in a file, before anything else reads it.

    <module>.hada_w1_a, …  ─▶  <module>.lora_A.weight (R, K), .lora_B.weight (N, R), .alpha
    <module>.oft_R.weight  ─▶  <module>.lora_W.weight (N, K), a meta tensor beside its `Made.weight`

So names, components, conversions, places and slots are those of LoRA. Without a configuration the
names are kohya's. Shapes are read first, on meta tensors: a few numbers may mean large factors,
which are made only if a model has room for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.dialects.spelling import spelt
from lorafx.adapter_store.methods.method import MERGE, AdapterMethod, Given, MadeFactors
from lorafx.adapter_store.methods.table import METHODS
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import parse
from lorafx.adapter_store.problems import Problem, Problems
from lorafx.adapter_store.saved import Made, Saved
from lorafx.errors import CheckpointError, UnsupportedAdapterError, itemised
from lorafx.model.module_graph import join

#: Keys and tensors of a module, by the ends of the keys.
Tensors = dict[str, tuple[str, Tensor]]
_KEYS = {method: method.pattern() for method in METHODS}
#: Names of A and B behind a module: PEFT's, and kohya's where there is no configuration.
_PEFT, _KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


class _Found(NamedTuple):
    """The tensors of a module: its own, and those that all modules of the method share."""

    method: AdapterMethod
    own: Tensors
    shared: Tensors


def as_factors(saved: Saved, model: nn.Module | None = None) -> Saved:
    """`saved` with factors or changed weights in place of other methods' tensors. Without a
    `model`, and for other components than `saved.component`, they are meta tensors. Raises
    CheckpointError for tensors that do not fit each other, UnsupportedAdapterError for what is
    served otherwise or not at all.
    """
    fields = saved.fields
    chosen = fields.method if isinstance(fields, PeftConfig) else None
    if isinstance(fields, PeftConfig) and chosen is None:
        return saved
    found = _found(saved.tensors, chosen)
    if not found:
        if chosen is not None:
            raise CheckpointError(
                f"{saved.where} holds nothing of {chosen.name}, which its configuration names: no "
                f"key ends in {chosen.marks}"
                + "".join(f"; no {leaf}, {why}" for leaf, why in chosen.absent.items())
            )
        return saved
    if isinstance(fields, Mapping):  # without a peft_type, which the keys tell
        kind = next(iter(found.values())).method.peft_type
        fields = PeftConfig.read(
            {"peft_type": kind, **fields},
            where=f"the configuration of {saved.where}",
            methods=True,
        )
    config = fields
    problems = Problems()
    tensors: dict[str, Tensor] = dict(saved.tensors)
    made: dict[str, Made] = {}
    planned: dict[str, tuple[Given, MadeFactors | ChangedWeight]] = {}
    for place, of_module in found.items():
        with problems.noting():
            planned[place] = _read(place, of_module, config, meta=True)
    _raise(saved, problems)
    mine = {place for place in planned if _is_wanted(place, saved, config is None)}
    _check_sizes(saved, [planned[place] for place in mine], model)
    for place, (given, result) in planned.items():
        method, leaves, _ = found[place]
        if model is not None and place in mine:
            with problems.noting():
                given, result = _read(place, found[place], config, meta=False)
        for leaf, (key, _) in leaves.items():
            if leaf != "dora_scale" or leaf in given.taken:
                tensors.pop(key)
        of = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in leaves.values())
        weight = result if isinstance(result, ChangedWeight) else None
        named = dict(_named(result, _KOHYA if config is None else _PEFT))
        for key in (join(place, name) for name in dict.fromkeys((*_KOHYA, *_PEFT, *named))):
            if key in tensors:
                problems.problems.append(f"{key} stands beside {of}; keep one")
        for name, tensor in named.items():
            key = join(place, name)
            tensors[key], made[key] = tensor, Made(method.name, of, weight)
        if not isinstance(result, ChangedWeight) and result.scale is not None:
            alpha = torch.tensor(result.scale * result.B.shape[1], dtype=torch.float64)
            tensors[join(place, "alpha")] = alpha
    if chosen is not None and not chosen.switch:
        problems.problems += _of_lora(chosen, tensors.keys() - made.keys())
    _raise(saved, problems)
    for key in {key for of in found.values() for key, _ in of.shared.values()}:
        tensors.pop(key)
    if config is not None and not (config.method and config.method.switch):
        # The ranks of the factors are others, and each has its s.
        config = replace(config, r=None, rank_pattern={}, use_rslora=False)
    return replace(saved, tensors=tensors, fields=config, made=made)


def _found(tensors: Mapping[str, Tensor], chosen: AdapterMethod | None) -> dict[str, _Found]:
    """The tensors of each module with marks of a method."""
    methods = [m for m in METHODS if not m.switch] if chosen is None else [chosen]
    found: dict[str, _Found] = {}
    shared: dict[AdapterMethod, Tensors] = {method: {} for method in methods}
    rest: list[tuple[AdapterMethod, str, str, str]] = []
    for key, tensor in tensors.items():
        for method in methods:
            match = _KEYS[method].fullmatch(key)
            if match is None:
                continue
            groups = match.groupdict()
            place, mark = groups["place"] or "", groups["mark"]
            if mark is not None:
                found.setdefault(place, _Found(method, {}, shared[method])).own[mark] = key, tensor
                break
            rest.append((method, place, groups.get("leaf") or groups["shared"], key))
    for method, place, leaf, key in rest:
        tensor = tensors[key]
        if place in found and found[place].method is method:  # also copies of what is shared
            found[place].own[leaf] = key, tensor
        elif re.fullmatch(method.shared, leaf):  # converted once, and not for each module
            wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
            shared[method][leaf] = key, wide
    for place, of in found.items():
        key = join(place, "alpha")
        if key in tensors:
            of.own["alpha"] = key, tensors[key]
    return found


def _of_lora(chosen: AdapterMethod, keys: Iterable[str]) -> Iterator[str]:
    """Pairs A, B in a file of another method, whose scale nothing says."""
    for key in sorted(keys):
        factor = parse(key)
        if factor is not None and factor.letter in ("A", "B"):
            yield f"{key} is a factor of LoRA, and the configuration names {chosen.name}"


def _named(
    made: MadeFactors | ChangedWeight, names: tuple[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """What takes the place of a module's tensors, by the ends of its keys."""
    if isinstance(made, ChangedWeight):
        shape = made.out_features or 0, made.in_features or 0
        yield "lora_W.weight", torch.empty(shape, device="meta")
    else:
        yield from zip(names, (made.A, made.B), strict=True)
        if made.bias is not None:
            yield "lora_B.bias", made.bias


def _read(
    place: str, found: _Found, config: PeftConfig | None, *, meta: bool
) -> tuple[Given, MadeFactors | ChangedWeight]:
    method = found.method
    if config is None and not method.lycoris:
        raise Problem(
            f"{place} is of {method.name}, which is not known without a configuration; give "
            "the folder with its adapter_config.json, or AdapterSource(..., config=...)"
        )
    given = Given(method, place, found.own | found.shared, config, meta=meta)
    made = method.read(given)
    # α of two whole matrices of LoKr counts for nothing, and DoRA's m goes with factors.
    full = {
        leaf
        for leaf, (_, tensor) in found.own.items()
        if tensor.numel() and not re.fullmatch(method.shared, leaf)
    }
    if unread := full - given.taken - {"alpha", "dora_scale"}:
        raise Problem(
            f"{place} has {', '.join(sorted(unread))}, which mean nothing beside "
            f"{', '.join(sorted(given.taken))}; keep one"
        )
    if isinstance(made, ChangedWeight):
        n, k = given.sizes.get("N"), given.sizes.get("K")
        made = made._replace(out_features=n, in_features=k)
    return given, made


def _is_wanted(place: str, saved: Saved, dotted: bool) -> bool:
    component = saved.component
    return component is None or spelt(f"{place}.alpha", torch.empty(0), dotted).component in (
        component,
        "",
    )


def _check_sizes(
    saved: Saved,
    planned: list[tuple[Given, MadeFactors | ChangedWeight]],
    model: nn.Module | None,
) -> None:
    """Refuse factors with more numbers than the model."""
    factors = [
        (_low_rank(made), given)
        for given, made in planned
        if isinstance(made, MadeFactors) or made.pair is not None
    ]
    numbers = sum(made.A.numel() + made.B.numel() for made, _ in factors)
    weights = () if model is None else (*model.parameters(), *model.buffers())
    room = 2 * sum(weight.nbytes for weight in weights)  # four bits: two numbers in a byte
    if model is None or numbers <= room:
        return
    made, given = max(factors, key=lambda item: item[0].B.shape[1])
    first, tensor = next(iter(given.tensors.values()))
    raise UnsupportedAdapterError(
        f"{saved.where}: as factors {given.method.name} would have {numbers} numbers here, and the "
        f"model has room for {room}; the largest rank is {made.B.shape[1]}, at {first} "
        f"{tuple(tensor.shape)}. Train it with a smaller r, or {MERGE}"
    )


def _low_rank(made: MadeFactors | ChangedWeight) -> MadeFactors:
    return made if isinstance(made, MadeFactors) else MadeFactors(*made.factors())


def _raise(saved: Saved, found: Problems) -> None:
    if problems := [*found.unsupported, *found.problems]:
        kind = UnsupportedAdapterError if found.unsupported else CheckpointError
        raise kind(itemised(f"{saved.where} cannot be read", problems))
