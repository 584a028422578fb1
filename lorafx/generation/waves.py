"""Batches of more adapters than there are slots: a call, or a generation, in waves of its rows.

    argument   (…, B, …) in the dimension of its role → the rows of each wave
    result     the rows of each wave in dimension 0   → (B, …), in the order of the batch

A request's result does not depend on its neighbours, so this is what the batch would have given.
Tensors may lie in lists, tuples and mappings, and those of results in transformers' dynamic caches.
What all requests share goes to every wave. Everything else is refused by name.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lorafx.adapter_store.names import adapters_among
from lorafx.adapter_store.store import AdapterStore
from lorafx.errors import BatchError
from lorafx.program.argument_roles import CACHES, ROW_DIMS, RoleTable
from lorafx.runtime.entry import CompiledForwards
from lorafx.runtime.requests import Names, Requests

#: Runs the model with these arguments for these requests.
_Call = Callable[[Sequence[Any], Mapping[str, Any], "Requests | None"], Any]

#: What `generate` takes that all requests share.
_SHARED = ("generation_config", "tokenizer")
#: What is no property of a row.
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
#: The rows of each wave.
Waves = Sequence[Sequence[int]]


def in_waves(
    entries: CompiledForwards,
    call: _Call,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    requests: Requests | None,
    *,
    generates: bool = False,
) -> Any:
    """What `call` returns for these arguments, of the model's forward or of its `generate`, in as
    many calls as the slots need where `Options.overflow` says so. Sequences of a wave that ended
    before the longest are padded as those of one batch would be.

    Raises:
        BatchError: an argument or a result cannot be cut by rows, or put together again. Of
            `generate` that is everything but the sequences, and what looks at rows by their number
            (processors of logits, criteria, streamers).
    """
    session, model = entries.session, entries.model
    generate: Any = getattr(model, "generate", None)
    if (
        session.program.options.overflow != "waves"
        or requests is None
        or requests.uniform
        or requests.tokens is not None
        or (session.running.here and session.running.entries)  # which reads its slots after this
        or (generates and not callable(generate))
    ):
        return call(args, kwargs, requests)
    names, row_dims = requests.names, session.program.config.row_dims
    kept = session.fetched(requests)  # noqa: F841 - before the lock is taken
    with session.lock:
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
            return call(args, kwargs, requests)
        table.check_rows(named, len(names))

        def part(rows: Tensor, name: str, value: Any) -> Any:
            if name in shared:
                return value
            return _cut(table, row_dims, named, renamed.get(name, name), value, rows)

        results = []
        for wave in waves:
            wave_args, wave_kwargs = table.changed(args, kwargs, partial(part, torch.tensor(wave)))
            results.append(call(wave_args, wave_kwargs, requests.part(wave)))
        with torch.no_grad():
            if generates:
                return _sequences(waves, results, _padding(bound, settings))
            return _joined(waves, "the result", results)


def waves_of(store: AdapterStore, names: Names) -> list[list[int]] | None:
    """Which rows, with adapters of these names, run together; None where all do, or one of them
    finds no room beside pinned adapters.

    There are as few waves as room allows, with about as many adapters each, so that no wave is
    left with a single row, which has a graph of its own. Adapters that have slots come first:
    later waves may take those over.
    """
    every, pinned = frozenset(adapters_among(names)), store.pinned
    apart = every - pinned
    if store.fits(every) or not all(store.fits(frozenset({name})) for name in apart):
        return None
    resident = store.resident
    order = sorted(apart, key=lambda name: (name not in resident, str(name)))
    parts = _parted(store, order, len(order))
    even = _parted(store, order, -(-len(order) // len(parts)))
    parts = even if len(even) == len(parts) else parts
    wave_of = {name: number for number, part in enumerate(parts) for name in part}
    waves: list[list[int]] = [[] for _ in parts]
    for row, name in enumerate(names):
        waves[wave_of.get(name, 0) if name else 0].append(row)
    return waves


def _parted(store: AdapterStore, names: Sequence[str], most: int) -> list[frozenset[str]]:
    """The names in order, at most so many together, in the first part where they find room."""
    parts: list[frozenset[str]] = []
    for name in names:
        for number, part in enumerate(parts):
            if len(part) < most and store.fits(part | {name}):
                parts[number] |= {name}
                break
        else:
            parts.append(frozenset({name}))
    return parts


def _is_shared(name: str, value: Any, settings: Any) -> bool:
    """Whether an argument of `generate` is of all requests."""
    return name in _SHARED or isinstance(value, _PLAIN) or hasattr(settings, name)


def _padding(bound: Mapping[str, Any], settings: Any) -> int:
    """The token that fills the rows of sequences that have ended."""
    for name in ("pad_token_id", "eos_token_id"):
        value = bound.get(name)
        value = getattr(settings, name, None) if value is None else value
        tokens = [] if value is None else torch.as_tensor(value).flatten().tolist()
        if tokens:
            return int(tokens[0])
    return 0


def _cut(
    table: RoleTable,
    row_dims: Mapping[str, int | None],
    call: Mapping[str, Any],
    name: str,
    value: Any,
    rows: Tensor,
) -> Any:
    """These rows of an argument of `call`; BatchError where it cannot be cut."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        role = table.role(name, value, call)
        shared = row_dims.get(name, 0) is None and value.dim()
        if not role.known or shared:
            what = "is declared to be shared" if role.known else "is in no table of roles"
            _refuse(
                f"nothing tells which entries of argument {name!r} {tuple(value.shape)} belong to "
                f"which request: it {what}. Declare the dimension of the requests with "
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
    if items is None or any(isinstance(item, _PLAIN) and item is not None for item in items):
        _refuse(
            f"argument {name!r} is a {type(value).__name__}, which cannot be cut into the rows of "
            "its requests"
        )
    labels = [name] * len(items)
    if table.spreads(name, value):  # each item is an argument
        labels = [f"{name}.{key}" for key in value]
    pairs = zip(labels, items, strict=True)
    return _rebuilt(value, [_cut(table, row_dims, call, n, item, rows) for n, item in pairs])


def _joined(waves: Waves, name: str, parts: Sequence[Any]) -> Any:
    """The result of the batch, or a part of it, by those of its waves; BatchError where they cannot
    be put together."""
    first = parts[0]
    if isinstance(first, Tensor):
        dim = (ROW_DIMS[name] if name in CACHES else 0) or 0
        return _rows(waves, name, parts, dim)
    if isinstance(first, _cache_classes()):
        return _cache(waves, name, parts)
    if isinstance(first, _PLAIN):
        if any(part != first for part in parts):
            _refuse(f"{name} is {first!r} for some rows and something else for others")
        return first
    columns = [_items(part) or [] for part in parts]
    if _items(first) is None or len(set(map(len, columns))) > 1:
        _refuse(f"{name} ({type(first).__name__}) cannot be put together from those of its rows")
    labels = map(str, first) if isinstance(first, Mapping) else [name] * len(columns[0])
    items = zip(labels, zip(*columns, strict=True), strict=True)
    return _rebuilt(first, [_joined(waves, label, column) for label, column in items])


def _rows(
    waves: Waves, name: str, parts: Sequence[Tensor], dim: int, several: bool = False
) -> Tensor:
    """A tensor of all rows, in dimension `dim`; with `several` of equally many entries of each."""
    sizes = [len(wave) for wave in waves]
    counts = [part.shape[dim] if part.dim() > dim else 0 for part in parts]
    times = counts[0] // sizes[0]
    alike = len({part.shape[:dim] + part.shape[dim + 1 :] for part in parts}) == 1
    if not alike or (times != 1 and not several) or counts != [size * times for size in sizes]:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        _refuse(
            f"{name} has shapes {shapes} for {', '.join(map(str, sizes))} requests, and dimension "
            f"{dim} should hold them: what is of all rows together has no order to be put into"
        )
    places = torch.tensor([row for wave in waves for row in wave]).argsort()
    order = (places[:, None] * times + torch.arange(times)).flatten()
    return torch.cat(list(parts), dim).index_select(dim, order.to(parts[0].device))


def _sequences(waves: Waves, parts: Sequence[Any], padding: int) -> Tensor:
    """What `generate` returns for all rows: (B · sequences, T), padded to the longest."""
    if not all(isinstance(part, Tensor) and part.dim() == 2 for part in parts):
        _refuse(
            f"generate() returns a {type(parts[0]).__name__}, and sequences alone are put together "
            "from waves: leave out return_dict_in_generate"
        )
    longest = max(part.shape[1] for part in parts)
    padded = [nn.functional.pad(p, (0, longest - p.shape[1]), value=padding) for p in parts]
    return _rows(waves, "the result", padded, 0, several=True)


def _cache(waves: Waves, name: str, parts: Sequence[Any]) -> Any:
    """A cache of the rows of all `parts`, with layers of keys and values that grow."""
    made = copy.copy(parts[0])
    inner = [n for n, value in vars(made).items() if isinstance(value, _cache_classes())]
    for attribute in inner:  # of an encoder and a decoder
        setattr(made, attribute, _cache(waves, name, [getattr(p, attribute) for p in parts]))
    if not inner:
        columns = zip(*(part.layers for part in parts), strict=True)
        made.layers = [_layer(waves, name, made, layers) for layers in columns]
    return made


def _layer(waves: Waves, name: str, cache: Any, layers: Sequence[Any]) -> Any:
    made = copy.copy(layers[0])
    known = isinstance(made, sys.modules["transformers.cache_utils"].DynamicLayer)
    known &= not getattr(cache, "offloading", False)
    for attribute, value in list(vars(made).items()):
        values = [getattr(layer, attribute) for layer in layers]
        if attribute in ("keys", "values") and isinstance(value, Tensor):
            if known and value.numel():
                setattr(made, attribute, _rows(waves, f"{attribute} of {name}", values, 0))
        elif isinstance(value, _PLAIN):
            known &= all(other == value for other in values)
        else:
            known &= isinstance(value, Tensor) and not value.dim()
    if not known:
        _refuse(
            f"{name} is a {type(cache).__name__} with layers {type(made).__name__}, which cannot "
            "be put together from those of its rows; give use_cache=False"
        )
    return made


def _refuse(why: str) -> NoReturn:
    raise BatchError(
        f"{why}. The batch has more adapters than slots. Split it, or compile with a larger "
        "LoraConfig(max_adapters=...)"
    )


def _items(value: Any) -> list[Any] | None:
    """What a container holds; None where it is none."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else None


def _rebuilt(value: Any, items: Sequence[Any]) -> Any:
    """A container like `value` with these items."""
    if isinstance(value, Mapping):
        made: Any = copy.copy(value)
        for key, item in zip(value, items, strict=True):
            made[key] = item
        return made
    kind: Any = type(value)
    return kind(*items) if hasattr(value, "_fields") else kind(items)


def _cache_classes() -> tuple[type, ...]:
    """transformers' caches, where it is imported."""
    known = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    return () if known is None else (known,)
