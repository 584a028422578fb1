"""Which forward arguments carry requests, and in which dimension.

By contract, index b along that dimension belongs to request b. It comes from `LoraConfig.row_dims`,
lorafx.program.row_dims, or, without declared roles, the convention that dimension 0 is the batch;
it is never guessed from sizes. An item `x` of a dict `batch` is "batch.x", with the role of "x"
unless declared.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from lorafx.errors import BatchError, ConfigError, LorafxWarning, nearest, some
from lorafx.program.row_dims import (
    BATCH_FIRST,
    DECLARED_DIMS,
    PACKED_DIMS,
    PICKS,
    PRIMARY,
    RANKED,
    ROW_DIMS,
    choices,
)


@dataclass(frozen=True)
class Role:
    """A tensor argument's name, and the requests' dimension.

    `known`: the dimension is known; `assumed`: by convention alone. `several`: it has equally many
    entries of each request, in turn. `request`: it belongs to this request alone, of `requests`.
    `picks`: its values are places of requests.
    """

    argument: str
    dim: int | None
    known: bool = True
    assumed: bool = False
    several: bool = False
    request: int | None = None
    requests: int = 0
    picks: bool = False


class RoleTable:
    """Roles of the arguments of a module's forward, or of its method `function`."""

    def __init__(
        self,
        module: nn.Module,
        row_dims: Mapping[str, int | None],
        function: Callable[..., Any] | None = None,
        *,
        packed: bool = False,
    ) -> None:
        self._signature = inspect.signature(module.forward if function is None else function)
        self._row_dims = dict(PACKED_DIMS if packed else row_dims)
        self.packed = packed
        #: Arguments already warned about.
        self._warned: set[str] = set()
        # Models with a main input name declare roles; for others batch first is the contract.
        self.declares_roles = hasattr(module, "main_input_name")

    def spread(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """`named` with items ("batch.x") for dicts without a role of their own."""
        found: dict[str, Any] = {}
        for name, value in named.items():
            if not isinstance(value, _NO_DICT) and self.spreads(name, value):
                found.update(self.spread({f"{name}.{key}": item for key, item in value.items()}))
            else:
                found[name] = value
        return found

    def spreads(self, name: str, value: Any) -> bool:
        return isinstance(value, Mapping) and name not in self._row_dims and name not in ROW_DIMS

    def by_name(self, args: tuple[Any, ...]) -> bool:
        kinds = [parameter.kind for parameter in self._signature.parameters.values()]
        positional = sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)
        only = inspect.Parameter.POSITIONAL_ONLY
        return len(args) <= positional and kinds.count(only) == 0

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The call's arguments by name; positional extras as `args.0`, ...; keyword extras flat."""
        bound = self._signature.bind_partial(*args, **kwargs)
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                named.update(value)
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                named.update({f"{name}.{index}": item for index, item in enumerate(value)})
            else:
                named[name] = value
        return named

    def changed(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], change: Callable[[str, Any], Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with each argument replaced by `change(name, value)`, by `bind`'s names."""
        bound = self._signature.bind_partial(*args, **kwargs)
        for name, value in bound.arguments.items():
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                made: Any = {own: change(own, item) for own, item in value.items()}
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                made = tuple(change(f"{name}.{index}", item) for index, item in enumerate(value))
            else:
                made = change(name, value)
            bound.arguments[name] = made
        return bound.args, bound.kwargs

    def role(self, argument: str, tensor: Tensor, call: Mapping[str, Any]) -> Role:
        """The role of `tensor`, found in `argument` (or in a container) of `call`."""
        if argument in self._row_dims:
            picks = self.packed and argument in PICKS and tensor.dim() == 1
            return Role(argument, self._row_dims[argument], picks=picks)
        if tensor.dim() == 0:
            return Role(argument, None)
        own = argument.rpartition(".")[2]
        if own in RANKED:
            several = argument in choices(call, argument.removesuffix(own))
            return Role(argument, RANKED[own](tensor, several))
        if own in ROW_DIMS:
            return _role(argument, ROW_DIMS[own])
        if self.declares_roles and own in DECLARED_DIMS:
            return _role(argument, DECLARED_DIMS[own])
        if self.declares_roles:
            return _role(argument, None, known=False)
        return _role(argument, BATCH_FIRST, assumed=True)

    def check_rows(self, named: Mapping[str, Any], rows: int) -> None:
        """Raise BatchError unless arguments have `rows` requests or a shared one; may warn once."""
        named = self.spread(named)
        for name, value in named.items():
            if not isinstance(value, Tensor):
                continue
            role = self.role(name, value, named)
            if not role.known or role.dim is None:
                continue
            check_requests(name, value.shape, role.dim, rows, named)
            if role.assumed and name not in self._warned and warn_ambiguous(name, value, rows):
                self._warned.add(name)

    def rows(self, named: Mapping[str, Any]) -> int | None:
        """Number of requests in the call, or None where no argument carries any."""
        named = self.spread(named)
        first = (own for main in PRIMARY for own in named if own.rpartition(".")[2] == main)
        for name in itertools.chain(first, named):
            value = named[name]
            if isinstance(value, Tensor):
                role = self.role(name, value, named)
                if role.known and role.dim is not None and value.dim() > role.dim:
                    return value.shape[role.dim]
        return None


#: isinstance(tensor, Mapping) takes five times as long.
_NO_DICT = (Tensor, int, float, str, type(None))


@functools.lru_cache(maxsize=512)
def _role(argument: str, dim: int | None, *, known: bool = True, assumed: bool = False) -> Role:
    """Cached: every call has the same roles, and making one takes 0.8 µs."""
    return Role(argument, dim, known=known, assumed=assumed)


_DEPTH = 8  # of nested containers; cache objects refer to much besides tensors


def tensor_leaves(value: Any) -> Iterator[Tensor]:
    """The tensors inside a call argument: containers, dataclasses, cache objects; not modules."""
    seen: set[int] = set()

    def walk(item: Any, left: int) -> Iterator[Tensor]:
        if isinstance(item, Tensor):
            yield item
            return
        if left == 0 or id(item) in seen or isinstance(item, (str, bytes, int, float, nn.Module)):
            return
        seen.add(id(item))
        if isinstance(item, Mapping):
            children: list[Any] = list(item.values())
        elif isinstance(item, (list, tuple, set)):
            children = list(item)
        elif is_dataclass(item) and not isinstance(item, type):
            children = [getattr(item, field.name) for field in fields(item)]
        else:
            children = list(getattr(item, "__dict__", {}).values())
        for child in children:
            yield from walk(child, left - 1)

    yield from walk(value, _DEPTH)


def sizes_of(named: Mapping[str, Any]) -> str:
    """The end of a message: the sizes of a call's tensors."""
    said = [
        f"{name} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{name}, a {type(value).__name__} and no tensor"
        for name, value in named.items()
        if isinstance(value, (Tensor, list)) or hasattr(value, "__array__")
    ]
    return f"; the call has {some(said, _SHOWN)}" if said else ""


_SHOWN = 8


def check_requests(
    name: str, shape: Sequence[int], dim: int, rows: int, call: Mapping[str, Any] | None = None
) -> None:
    """Raise BatchError, listing `call`, unless dimension `dim` has `rows` entries or one."""
    if len(shape) <= dim or shape[dim] not in (rows, 1):
        raise BatchError(
            f"argument {name!r} has shape {tuple(shape)}, but its dimension {dim} should hold the "
            f"{rows} requests; declare which dimension does with LoraConfig(row_dims={{{name!r}: "
            "dim}). Give None instead of a dimension when all requests share the argument, or when "
            "no adapter changes what is computed from it alone (any number of images per request)"
            f"{sizes_of(call or {})}"
        )


def warn_ambiguous(name: str, tensor: Tensor, rows: int) -> bool:
    """Warn, and return True, if besides the assumed first dimension another has as many entries."""
    sizes = tensor.shape[1:-1] if tensor.is_floating_point() else tensor.shape[1:]
    if rows not in sizes:
        return False
    other = 1 + list(sizes).index(rows)
    warnings.warn(
        f"argument {name!r} has shape {tuple(tensor.shape)}, and it is not declared which "
        f"dimension holds the {rows} requests. Dimension 0 is assumed, but dimension {other} has "
        "as many entries; if that one holds the requests, rows get each other's adapters. Declare "
        f"it with LoraConfig(row_dims={{{name!r}: {other}}}), or confirm dimension 0 with "
        f"row_dims={{{name!r}: 0}}",
        LorafxWarning,
        stacklevel=2,
    )
    return True


def check_names(row_dims: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ConfigError where a name in `LoraConfig.row_dims` is no argument of the model's methods
    or of a forward in it, or looks misspelt. A dot precedes a dict's key."""
    known = {*ROW_DIMS, *RANKED}
    functions = [getattr(module.forward, "__func__", module.forward) for module in model.modules()]
    own = (getattr(type(model), name) for name in dir(type(model)) if not name.startswith("_"))
    for function in dict.fromkeys([*functions, *filter(inspect.isfunction, own)]):
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # written in C
            continue
        known |= {parameter.name for parameter in parameters}
    taken = inspect.signature(model.forward).parameters.values()
    any_name = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken)
    for name in row_dims:
        first = name.partition(".")[0]
        likely = nearest(first, known, cutoff=_MISSPELT)
        if first not in known and (likely or not any_name):
            raise ConfigError(
                f"LoraConfig.row_dims names {name!r}, which no method of "
                f"{type(model).__name__} takes{likely}; its forward takes "
                f"{', '.join(parameter.name for parameter in taken)}. For an item of a dict, give "
                "'argument.key'"
            )


#: Similarity at which a name counts as misspelt.
_MISSPELT = 0.8
