"""Batches of more adapters than there are slots: a call, or a generation, in waves of its rows.

    argument   (…, B, …) in the dimension of its role → the rows of each wave
    result     the rows of each wave in dimension 0   → (B, …), in the order of the batch

A request's result does not depend on its neighbours, so this is what the batch would have given.
Tensors may lie in lists, tuples, mappings and dataclasses, and those of results in transformers'
dynamic caches. What all requests share goes to every wave. Everything else is refused by name.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lorafx.adapter_store.names import BASE
from lorafx.adapter_store.store import AdapterStore
from lorafx.errors import BatchError
from lorafx.program.argument_roles import RoleTable
from lorafx.program.row_dims import CACHES, ROW_DIMS
from lorafx.runtime.entry import CompiledForwards
from lorafx.runtime.requests import Names
from lorafx.runtime.session import Session

#: Runs the model with these arguments for these requests: adapter names, and which of them each
#: token uses.
_Call = Callable[[Sequence[Any], Mapping[str, Any], "Names | None", "Tensor | None"], Any]

#: What `generate` takes that all requests share.
_SHARED = ("generation_config", "tokenizer")
#: What is no property of a row.
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


def in_waves(
    entries: CompiledForwards,
    call: _Call,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Names | None,
    tokens: Tensor | None = None,
    *,
    generates: bool = False,
) -> Any:
    """What `call` returns for these arguments, of the model's forward or of its `generate`, in as
    many calls as the slots need. Sequences of a wave that ended before the longest are padded as
    those of one batch would be.

    Raises:
        BatchError: an argument or a result cannot be cut by rows, or put together again. Of
            `generate` also: what looks at rows by their number (processors of logits, criteria,
            streamers) was handed in; beams are to be traced (`beam_indices`); or waves took
            different numbers of steps, and more than the sequences is asked for.
    """
    session, model = entries.session, entries.model
    # What calls around this one read stays in its slots.
    inside = session.running.here and session.running.entries
    generate: Any = getattr(model, "generate", None)
    if (
        names is None
        or session.program.options.overflow != "waves"
        or inside
        or (generates and not callable(generate))
    ):
        return call(args, kwargs, names, tokens)
    with session.lock:
        waves = _waves(session, names, tokens)
        if waves is None:
            return call(args, kwargs, names, tokens)
        row_dims = session.program.config.row_dims
        if generates:
            table = RoleTable(model, row_dims, generate)
        else:
            table = entries.of(model, per_token=tokens is not None).roles
        bound = table.bind(tuple(args), kwargs)
        settings = bound.get("generation_config") or getattr(model, "generation_config", None)
        renamed = {"inputs": getattr(model, "main_input_name", "inputs")} if generates else {}
        shared = {n for n, value in bound.items() if generates and _is_shared(n, value, settings)}
        named = {renamed.get(name, name): value for name, value in bound.items()}
        if table.rows(named) != (len(names) if tokens is None else len(tokens)):
            return call(args, kwargs, names, tokens)
        padding = _padding(bound, settings) if generates else None
        rows = _Rows(table, row_dims, named, waves, several=generates, padding=padding)
        rows.check({name: value for name, value in named.items() if name not in shared})

        def part(wave: int, name: str, value: Any) -> Any:
            return value if name in shared else rows.part(wave, renamed.get(name, name), value)

        results = []
        for number, wave in enumerate(waves):
            wave_args, wave_kwargs = table.changed(args, kwargs, partial(part, number))
            if tokens is None:
                of_rows = [names[row] for row in wave]
                results.append(call(wave_args, wave_kwargs, of_rows, None))
            else:
                results.append(call(wave_args, wave_kwargs, names, tokens[wave]))
        with torch.no_grad():
            return rows.joined("the result", results)


def _waves(session: Session, names: Names, tokens: Tensor | None) -> list[list[int]] | None:
    """The rows of each wave; None where the batch is one, or no number of waves would do."""
    if session.base.merged is not None:  # which needs no slot
        return None
    wanted = [frozenset[str]() if n is None or n == BASE else frozenset({n}) for n in names]
    for name in frozenset[str]().union(*wanted):
        session.store.check_known(name)
    if tokens is None:
        return waves_of(session.store, wanted)
    used = [[wanted[i] for i in row.unique().tolist() if i >= 0] for row in tokens]
    return waves_of(session.store, [frozenset[str]().union(*of_row) for of_row in used])


def waves_of(store: AdapterStore, rows: Sequence[frozenset[str]]) -> list[list[int]] | None:
    """Which of `rows`, by the adapters of each, run together; None where all do, or a row alone
    finds no slots.

    There are as few waves as the slots allow, with about as many adapters each, so that no wave is
    left with a single row, which has a graph of its own. Adapters that have slots come first:
    later waves may take those over.
    """
    every = frozenset[str]().union(*rows)
    if store.fits(every) or not all(map(store.fits, rows)):
        return None
    pinned, resident = store.pinned, store.resident
    count = len(every - pinned)
    most = max(store.max_adapters - len(pinned), 1)
    share = -(-count // -(-count // most)) if count else 0
    share = max(share, *(len(row - pinned) for row in rows))
    order = sorted(range(len(rows)), key=lambda row: len(rows[row] - resident.keys()))
    waves: list[tuple[set[str], list[int]]] = []
    for row in order:
        for adapters, members in waves:
            joint = adapters | rows[row]
            if rows[row] <= adapters or (
                len(joint - pinned) <= share and store.fits(frozenset(joint))
            ):
                adapters |= rows[row]
                members.append(row)
                break
        else:
            waves.append((set(rows[row]), [row]))
    return [sorted(members) for _, members in waves]


def _is_shared(name: str, value: Any, settings: Any) -> bool:
    """Whether an argument of `generate` is of all requests."""
    return name in _SHARED or isinstance(value, _PLAIN) or hasattr(settings, name)


def _padding(bound: Mapping[str, Any], settings: Any) -> int | None:
    """The token that fills the rows of sequences that have ended."""
    for name in ("pad_token_id", "eos_token_id"):
        value = bound.get(name)
        value = getattr(settings, name, None) if value is None else value
        tokens = [] if value is None else torch.as_tensor(value).flatten().tolist()
        if tokens:
            return int(tokens[0])
    return None


class _Rows:
    """Cuts the arguments of a call (`named`) into the rows of each wave, and puts results together.

    With `several` a result may have several entries of each request, as `generate` returns them;
    `padding` fills sequences that have ended. `row_dims` are those that the user declared.
    """

    def __init__(
        self,
        table: RoleTable,
        row_dims: Mapping[str, int | None],
        named: Mapping[str, Any],
        waves: Sequence[Sequence[int]],
        *,
        several: bool,
        padding: int | None,
    ) -> None:
        self._table, self._row_dims, self._named = table, row_dims, named
        self._several, self._padding = several, padding
        self._waves = [torch.tensor(list(wave)) for wave in waves]
        self._count = sum(map(len, waves))
        #: For each row of the batch, its place among the rows of all waves.
        self._places = torch.cat(self._waves).argsort()

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise BatchError unless these arguments can be cut."""
        self._table.check_rows(arguments, self._count)
        for name, value in arguments.items():
            self._check(name, value)

    def _check(self, name: str, value: Any) -> None:
        if isinstance(value, _PLAIN):
            return
        if isinstance(value, Tensor):
            role = self._table.role(name, value, self._named)
            shared = self._row_dims.get(name, 0) is None and value.dim()
            if not role.known or shared:
                what = "is declared to be shared" if role.known else "is in no table of roles"
                _refuse(
                    f"nothing tells which entries of argument {name!r} {tuple(value.shape)} "
                    f"belong to which request: it {what}. Declare the dimension of the requests "
                    f"with LoraConfig(row_dims={{{name!r}: dim}})"
                )
            if role.dim is not None and value.shape[role.dim] not in (1, self._count):
                _refuse(
                    f"dimension {role.dim} of argument {name!r} {tuple(value.shape)} does not "
                    f"hold the {self._count} requests"
                )
            return
        if isinstance(value, _cache_classes()):
            _refuse(
                f"argument {name!r} is a {type(value).__name__}, which all requests fill together"
            )
        inside = self._inside(name, value)
        if inside is None or any(isinstance(i, _PLAIN) and i is not None for _, i in inside):
            _refuse(
                f"argument {name!r} ({type(value).__name__}) cannot be cut into the rows of "
                "its requests"
            )
        for label, item in inside:
            self._check(label, item)

    def _inside(self, name: str, value: Any) -> list[tuple[str, Any]] | None:
        """What an argument holds, each item by the name that its role goes by."""
        items, spreads = _items(value), self._table.spreads(name, value)
        if items is None:
            return None
        return [(f"{name}.{label}" if spreads else name, item) for label, item in items]

    def part(self, wave: int, name: str, value: Any) -> Any:
        """The argument of one wave."""
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, Tensor):
            dim = self._table.role(name, value, self._named).dim
            if dim is None or value.shape[dim] == 1 != self._count:
                return value
            with torch.no_grad():
                return value.index_select(dim, self._waves[wave].to(value.device))
        inside = self._inside(name, value) or ()
        return _rebuilt(value, [self.part(wave, label, item) for label, item in inside])

    def joined(self, name: str, parts: Sequence[Any]) -> Any:
        """The result of the batch; BatchError where a part of it cannot be put together."""
        first = parts[0]
        if isinstance(first, Tensor):
            return self._tensors(name, parts)
        if isinstance(first, _cache_classes()):
            return self._cache(name, parts)
        if isinstance(first, _PLAIN):
            if any(part != first for part in parts):
                _refuse(f"{name} is {first!r} for some rows and something else for others")
            return first
        items = [_items(part) or [] for part in parts]
        if _items(first) is None or len(set(map(len, items))) > 1:
            _refuse(
                f"{name} ({type(first).__name__}) cannot be put together from the rows' own, of "
                f"{', '.join(str(len(of_part)) for of_part in items)} entries"
            )
        columns = zip(*items, strict=True)
        return _rebuilt(
            first,
            [self.joined(column[0][0] or name, [item for _, item in column]) for column in columns],
        )

    def _tensors(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        if name == "beam_indices":
            _refuse("beam_indices are places in the batch, which are others in each wave")
        dim = (ROW_DIMS[name] if name in CACHES else 0) or 0
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        sizes = [len(wave) for wave in self._waves]
        counts = [part.shape[dim] if part.dim() > dim else 0 for part in parts]
        times = counts[0] // sizes[0]  # entries of each request
        several = times > 1 and not self._several
        if times < 1 or several or counts != [size * times for size in sizes]:
            _refuse(
                f"{name} has shapes {shapes} for {', '.join(map(str, sizes))} requests, and "
                f"dimension {dim} should hold them: what is of all rows together has no order to "
                "be put into"
            )
        if name in ("sequences", "the result") and self._several:
            parts = self._padded(parts)
        if len({part.shape[:dim] + part.shape[dim + 1 :] for part in parts}) > 1:
            _refuse(f"{name} has shapes {shapes} for the rows of the batch")
        whole = torch.cat(list(parts), dim)
        order = self._places[:, None] * times + torch.arange(times)
        return whole.index_select(dim, order.flatten().to(whole.device))

    def _padded(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        lengths = [part.shape[1] if part.dim() == 2 else 0 for part in parts]
        if len(set(lengths)) == 1 or self._padding is None:
            return parts
        return [
            nn.functional.pad(part, (0, max(lengths) - length), value=self._padding)
            for part, length in zip(parts, lengths, strict=True)
        ]

    def _cache(self, name: str, parts: Sequence[Any]) -> Any:
        """A cache of the rows of all `parts`, with layers of keys and values that grow."""
        made = copy.copy(parts[0])
        inner = [n for n, value in vars(made).items() if isinstance(value, _cache_classes())]
        for attribute in inner:  # of an encoder and a decoder
            caches = [getattr(part, attribute) for part in parts]
            setattr(made, attribute, self._cache(name, caches))
        if not inner:
            columns = zip(*(part.layers for part in parts), strict=True)
            made.layers = [self._layer(name, made, layers) for layers in columns]
        return made

    def _layer(self, name: str, cache: Any, layers: Sequence[Any]) -> Any:
        made = copy.copy(layers[0])
        known = isinstance(made, sys.modules["transformers.cache_utils"].DynamicLayer)
        known &= not getattr(cache, "offloading", False)
        for attribute, value in list(vars(made).items()):
            values = [getattr(layer, attribute) for layer in layers]
            if isinstance(value, Tensor) and attribute in ("keys", "values"):
                if known and value.numel():
                    setattr(made, attribute, self._tensors(f"{attribute} of {name}", values))
            elif isinstance(value, _PLAIN):
                if any(other != value for other in values):
                    _refuse(f"{attribute} of {name} ({type(made).__name__}) differs between rows")
            else:
                known &= isinstance(value, Tensor) and not value.dim()
        if not known:
            _refuse(
                f"{name} is a {type(cache).__name__} with layers {type(made).__name__}, which "
                "cannot be cut into rows; give a DynamicCache, or use_cache=False"
            )
        return made


def _refuse(why: str) -> NoReturn:
    raise BatchError(
        f"{why}. The batch has more adapters than slots. Split it, or compile with a larger "
        "LoraConfig(max_adapters=...)"
    )


def _items(value: Any) -> list[tuple[str, Any]] | None:
    """What a container holds, by name where its items have names; None where it is none."""
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    return [("", item) for item in value] if isinstance(value, (list, tuple)) else None


def _rebuilt(value: Any, items: Sequence[Any]) -> Any:
    """A container like `value` with these items."""
    kind: Any = type(value)
    if is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in fields(value))
        return replace(value, **dict(zip(names, items, strict=True)))
    if isinstance(value, Mapping):
        return kind(zip(value, items, strict=True))
    return kind(*items) if hasattr(value, "_fields") else kind(items)


def _cache_classes() -> tuple[type, ...]:
    """transformers' caches, where it is imported."""
    known = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    return () if known is None else (known,)
