"""Batches of more adapters than there are slots: a call, or a generation, in waves of its rows.

    argument   (…, B, …) in the dimension of its role → the rows of each wave
    result     the rows of each wave in dimension 0   → (B, …), in the order of the batch

A request's result does not depend on its neighbours, so the result is that of the whole batch.
Tensors may be in lists, tuples and mappings, and those of results in transformers' dynamic caches.
Arguments that all requests share go to every wave. Everything else is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lorafx.adapter_store.names import adapters_among
from lorafx.adapter_store.store import AdapterStore
from lorafx.config import RowDim
from lorafx.errors import BatchError
from lorafx.libraries import CACHE, is_of_library
from lorafx.program.argument_roles import CACHES, ROW_DIMS, RoleTable
from lorafx.runtime.forwards import CompiledForwards
from lorafx.runtime.requests import Names, Requests

#: Arguments of `generate` that all requests share.
_SHARED = ("generation_config", "tokenizer")
#: Types of values that do not depend on rows.
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
#: The rows of each wave.
Waves = Sequence[Sequence[int]]


def in_waves(
    entries: CompiledForwards,
    find: Callable[[], Callable[..., Any]],
    requests: Requests | None,
    *,
    generates: bool = False,
) -> Callable[[Sequence[Any], Mapping[str, Any]], Any]:
    """What serves a call of the model's forward, or (`generates`) of its `generate`, given the
    call's arguments: it runs what `find` returns, as `Session.call`. If the adapters have no slots
    together and `Options.overflow` is "waves", it does so once for each wave. Sequences that ended
    before the longest are padded as in one batch.

    It raises:
        BatchError: an argument or a result cannot be split by rows, or joined. `generate` can only
            return sequences, and cannot take objects that index rows (processors of logits,
            criteria, streamers).
    """
    session, model = entries.session, entries.model
    if (
        session.program.options.overflow != "waves"
        or requests is None
        or requests.uniform
        or requests.tokens is not None
        or (session.running.here and session.running.entries)  # the outer call needs its slots
        or (generates and not callable(getattr(model, "generate", None)))
    ):
        return partial(session.call, find, requests)
    return partial(_in_waves, entries, partial(session.call, find), requests, generates)


def _in_waves(
    entries: CompiledForwards,
    call: Callable[[Requests, Sequence[Any], Mapping[str, Any]], Any],
    requests: Requests,
    generates: bool,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    session, model = entries.session, entries.model
    generate: Any = getattr(model, "generate", None)
    names, row_dims = requests.names, session.program.config.row_dims
    with session.fetch_adapters(requests), session.lock:
        for name in adapters_among(names):
            session.store.check_known(name)
        waves = None if session.base.merged is not None else waves_of(session.store, names)
        table = RoleTable(model, row_dims, generate) if generates else entries.of(model).roles
        bound = table.bind(tuple(args), kwargs)
        settings = bound.get("generation_config") or getattr(model, "generation_config", None)
        renamed = {"inputs": getattr(model, "main_input_name", "inputs")} if generates else {}
        shared = {n for n, value in bound.items() if generates and _is_shared(n, value, settings)}
        named = {renamed.get(n, n): value for n, value in bound.items() if n not in shared}
        if waves is None or table.rows(named) != len(names):
            return call(requests, args, kwargs)
        table.check_rows(named, len(names))

        def split(rows: Tensor, name: str, value: Any) -> Any:
            if name in shared:
                return value
            return _part(table, row_dims, named, renamed.get(name, name), value, rows)

        results = []
        for wave in waves:
            wave_args, wave_kwargs = table.changed(args, kwargs, partial(split, torch.tensor(wave)))
            results.append(call(requests.part(wave), wave_args, wave_kwargs))
        with torch.no_grad():
            if generates:
                return _join_sequences(waves, results, _padding_token(bound, settings))
            return _join(waves, "the result", results)


def waves_of(store: AdapterStore, names: Names) -> list[list[int]] | None:
    """The rows of each wave, for rows with adapters of these names. None if all run together, or if
    one of the adapters does not fit beside the pinned ones.

    There are as few waves as the slots allow, with about as many adapters each, so that no wave has
    a single row, which would need another graph. Adapters that have slots come first, since later
    waves may evict them.
    """
    adapters, pinned = frozenset(adapters_among(names)), store.pinned
    unpinned = adapters - pinned
    if store.fits(adapters) or not all(store.fits(frozenset({name})) for name in unpinned):
        return None
    resident = store.resident
    order = sorted(unpinned, key=lambda name: (name not in resident, str(name)))
    parts = _first_fit(store, order, len(order))
    even = _first_fit(store, order, -(-len(order) // len(parts)))
    parts = even if len(even) == len(parts) else parts
    wave_of = {name: number for number, part in enumerate(parts) for name in part}
    waves: list[list[int]] = [[] for _ in parts]
    for row, name in enumerate(names):
        waves[wave_of.get(name, 0) if name else 0].append(row)
    return waves


def _first_fit(store: AdapterStore, names: Sequence[str], limit: int) -> list[frozenset[str]]:
    """Parts of at most `limit` names: each name is in the first part in which it fits."""
    parts: list[frozenset[str]] = []
    for name in names:
        for number, part in enumerate(parts):
            if len(part) < limit and store.fits(part | {name}):
                parts[number] |= {name}
                break
        else:
            parts.append(frozenset({name}))
    return parts


def _is_shared(name: str, value: Any, settings: Any) -> bool:
    return name in _SHARED or isinstance(value, _PLAIN) or hasattr(settings, name)


def _padding_token(bound: Mapping[str, Any], settings: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        value = bound.get(name)
        value = getattr(settings, name, None) if value is None else value
        tokens = [] if value is None else torch.as_tensor(value).flatten().tolist()
        if tokens:
            return int(tokens[0])
    return 0


def _part(
    table: RoleTable,
    row_dims: Mapping[str, RowDim],
    call: Mapping[str, Any],
    name: str,
    value: Any,
    rows: Tensor,
) -> Any:
    """The `rows` of `value`, an argument of `call`. Raises BatchError if it cannot be split."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        role = table.role(name, value, call)
        shared = row_dims.get(name, 0) is None and value.dim()
        if not role.known or shared:
            why = "is declared to be shared" if role.known else "is in no table of roles"
            _refuse(
                f"nothing tells which entries of argument {name!r} {tuple(value.shape)} belong to "
                f"which request: it {why}. Declare the dimension of the requests with "
                f"LoraConfig(row_dims={{{name!r}: dim}})"
            )
        if role.dim is None or value.shape[role.dim] == 1:
            return value
        if value.shape[role.dim] != table.rows(call):
            _refuse(
                f"dimension {role.dim} of argument {name!r} {tuple(value.shape)} does not hold the "
                f"{table.rows(call)} requests"
            )
        with torch.no_grad():
            return value.index_select(role.dim, rows.to(value.device))
    items = _items(value)
    if items is not None and table.of_items(name, value):
        return _rebuilt(value, [items[row] for row in rows.tolist()])
    if items is None or any(isinstance(item, _PLAIN) and item is not None for item in items):
        _refuse(
            f"argument {name!r} is a {type(value).__name__}, which cannot be split into the rows "
            "of its requests"
        )
    labels = table.parts(name, value) or [name] * len(items)
    pairs = zip(labels, items, strict=True)
    return _rebuilt(value, [_part(table, row_dims, call, n, item, rows) for n, item in pairs])


def _join(waves: Waves, name: str, parts: Sequence[Any]) -> Any:
    """Join `name`, the result or a value inside it, from `parts`, that of each wave. Raises
    BatchError if that is not possible."""
    first = parts[0]
    if isinstance(first, Tensor):
        dim = (ROW_DIMS[name] if name in CACHES else 0) or 0
        return _join_rows(waves, name, parts, dim)
    if is_of_library(first, *CACHE):
        return _join_caches(waves, name, parts)
    if isinstance(first, _PLAIN):
        if any(part != first for part in parts):
            _refuse(f"{name} is {first!r} for some rows and something else for others")
        return first
    columns = [_items(part) or [] for part in parts]
    if _items(first) is None or len(set(map(len, columns))) > 1:
        _refuse(f"{name} ({type(first).__name__}) cannot be joined from those of its rows")
    labels = map(str, first) if isinstance(first, Mapping) else [name] * len(columns[0])
    items = zip(labels, zip(*columns, strict=True), strict=True)
    return _rebuilt(first, [_join(waves, label, column) for label, column in items])


def _join_rows(
    waves: Waves, name: str, parts: Sequence[Tensor], dim: int, several: bool = False
) -> Tensor:
    """A tensor of all rows, in dimension `dim`. With `several` a row may have several entries."""
    sizes = [len(wave) for wave in waves]
    counts = [part.shape[dim] if part.dim() > dim else 0 for part in parts]
    times = counts[0] // sizes[0]
    alike = len({part.shape[:dim] + part.shape[dim + 1 :] for part in parts}) == 1
    if not alike or (times != 1 and not several) or counts != [size * times for size in sizes]:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        _refuse(
            f"{name} has shapes {shapes} for {', '.join(map(str, sizes))} requests, and dimension "
            f"{dim} should hold them: a result of all rows together cannot be joined"
        )
    positions = torch.tensor([row for wave in waves for row in wave]).argsort()
    order = (positions[:, None] * times + torch.arange(times)).flatten()
    return torch.cat(list(parts), dim).index_select(dim, order.to(parts[0].device))


def _join_sequences(waves: Waves, parts: Sequence[Any], padding: int) -> Tensor:
    """The sequences that `generate` returns: (B · sequences, T), padded to the longest."""
    if not all(isinstance(part, Tensor) and part.dim() == 2 for part in parts):
        _refuse(
            f"generate() returns a {type(parts[0]).__name__}, and only sequences can be joined "
            "from waves: leave out return_dict_in_generate"
        )
    longest = max(part.shape[1] for part in parts)
    padded = [nn.functional.pad(p, (0, longest - p.shape[1]), value=padding) for p in parts]
    return _join_rows(waves, "the result", padded, 0, several=True)


def _join_caches(waves: Waves, name: str, parts: Sequence[Any]) -> Any:
    """A cache with the rows of all `parts`, whose layers are transformers' dynamic ones."""
    cache = copy.copy(parts[0])
    inner = [n for n, value in vars(cache).items() if is_of_library(value, *CACHE)]
    for attribute in inner:  # of an encoder and a decoder
        caches = [getattr(part, attribute) for part in parts]
        setattr(cache, attribute, _join_caches(waves, name, caches))
    if not inner:
        columns = zip(*(part.layers for part in parts), strict=True)
        cache.layers = [_join_layers(waves, name, cache, layers) for layers in columns]
    return cache


def _join_layers(waves: Waves, name: str, cache: Any, layers: Sequence[Any]) -> Any:
    layer = copy.copy(layers[0])
    known = is_of_library(layer, CACHE[0], "DynamicLayer")
    known &= not getattr(cache, "offloading", False)
    for attribute, value in list(vars(layer).items()):
        values = [getattr(part, attribute) for part in layers]
        if attribute in ("keys", "values") and isinstance(value, Tensor):
            if known and value.numel():
                setattr(layer, attribute, _join_rows(waves, f"{attribute} of {name}", values, 0))
        elif isinstance(value, _PLAIN):
            known &= all(other == value for other in values)
        else:
            known &= isinstance(value, Tensor) and not value.dim()
    if not known:
        _refuse(
            f"{name} is a {type(cache).__name__} with layers {type(layer).__name__}, which cannot "
            "be joined from those of its rows; give use_cache=False"
        )
    return layer


def _refuse(why: str) -> NoReturn:
    raise BatchError(
        f"{why}. The batch has more adapters than slots. Split it, or compile with a larger "
        "LoraConfig(max_adapters=...)"
    )


def _items(value: Any) -> list[Any] | None:
    """The items of a container; None for any other value."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else None


def _rebuilt(value: Any, items: Sequence[Any]) -> Any:
    if isinstance(value, Mapping):
        mapping: Any = copy.copy(value)
        for key, item in zip(value, items, strict=True):
            mapping[key] = item
        return mapping
    kind: Any = type(value)
    return kind(*items) if hasattr(value, "_fields") else kind(items)
