"""Which forward arguments carry requests, and in which dimension.

Index b along that dimension belongs to request b. The dimension comes from `LoraConfig.row_dims`,
from the tables below of names in transformers' forwards, or, for models that declare no roles, from
the convention that dimension 0 is the batch; it is never guessed from sizes. An item `x` of a dict
or dataclass `batch` is "batch.x", and has the role of "x" unless another is declared; an item of a
list or tuple is "batch.0". Of a list that `row_dims` declares as "items", item b is request b's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from lorafx.config import RowDim
from lorafx.errors import BatchError, ConfigError, nearest
from lorafx.program.argument_checks import check_requests, sizes_of, warn_ambiguous, warn_items

#: The dimension of requests by convention.
BATCH_FIRST = 0

#: Arguments in order of precedence for the number of requests.
PRIMARY = (
    *("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features"),
    *("decoder_input_ids", "decoder_inputs_embeds"),
)
_MASKS_AND_TYPES = (
    *("attention_mask", "decoder_attention_mask", "encoder_attention_mask"),
    *("cross_attention_mask", "global_attention_mask", "padding_mask", "input_mask", "pixel_mask"),
    *("pixel_attention_mask", "spatial_shapes", "bool_masked_pos", "mask_time_indices"),
    *("perm_mask", "target_mapping", "token_type_ids", "mm_token_type_ids", "query_embeds"),
    *("qformer_input_ids", "qformer_attention_mask", "flattened_patches", "segment_ids", "langs"),
    *("lengths", "bbox", "labels", "negative_prompt_ids", "negative_prompt_attention_mask"),
)
#: Arguments that keep earlier tokens. From transformers 5.24 on, models call theirs "cache".
CACHES = ("cache", "past_key_values", "cache_params", "past_buckets_states", "state", "mems")
_STATES = ("encoder_hidden_states", "encoder_outputs", *CACHES)
_SHARED = (
    *("cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask"),
    *("logits_to_keep", "num_logits_to_keep"),
)
#: Argument role -> dimension of the requests; None for shared arguments.
ROW_DIMS: Mapping[str, int | None] = {
    **dict.fromkeys((*PRIMARY, *_MASKS_AND_TYPES, *_STATES), BATCH_FIRST),
    "mems": 1,  # (memory length, batch, hidden)
    **dict.fromkeys(_SHARED),
}

#: For models that declare roles only: in others such names are ambiguous, and the sequence may be
#: the first dimension.
DECLARED_DIMS: Mapping[str, int | None] = dict.fromkeys(
    (
        # images beside a text
        *("visual_embeds", "visual_attention_mask", "visual_token_type_ids"),
        *("visual_feats", "visual_pos"),
        # time series
        *("past_values", "past_time_features", "past_observed_mask", "observed_mask"),
        *("future_values", "future_time_features", "future_observed_mask"),
        *("static_categorical_features", "static_real_features"),
        # trajectories
        *("states", "actions", "rewards", "returns_to_go", "timesteps"),
    ),
    BATCH_FIRST,
)

#: For a packed call over a paged cache, (1, T) tokens of all sequences in turn. Each token is a
#: request here, with the slot of its own request.
PACKED_DIMS: Mapping[str, int | None] = {
    "input_ids": 1,
    "inputs_embeds": 1,
    "position_ids": 1,
    "token_type_ids": 1,
    "attention_mask": 2,  # (1, 1, T, keys)
    "cache": None,
    "logits_to_keep": None,
}

#: Arguments of a packed call whose values are indices of tokens.
PICKS = ("logits_to_keep",)

#: Arguments whose channels and image sizes are constants of the graph: with symbols, tracing window
#: partitions and rolls (Swin) does not end.
IMAGES = ("pixel_values",)

#: Arguments with an entry for each token -> the dimension of tokens, of length T in all of them.
TOKEN_DIMS: Mapping[str, int] = dict.fromkeys(
    ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"), 1
)


def caches(named: Mapping[str, Any]) -> list[Any]:
    return [named[name] for name in CACHES if named.get(name) is not None]


def new_tokens(named: Mapping[str, Any]) -> dict[str, int]:
    """A call's arguments with an entry for each of its T tokens -> the dimension of tokens."""
    cached = bool(caches(named))
    return {
        name: dim
        for name, dim in TOKEN_DIMS.items()
        if isinstance(value := named.get(name), Tensor)
        and value.dim() > dim
        and (name != "attention_mask" or (value.dim() == 2 and not cached))
    }


#: Arguments with an entry for each token -> their rank if a request is one sequence.
_RANKS: Mapping[str, int] = {**dict.fromkeys(TOKEN_DIMS, 2), "inputs_embeds": 3}


def choices(named: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    """The names of arguments (B, C, T) whose dimension 1 holds a request's sequences (multiple
    choice)."""
    values = {name: named.get(prefix + name) for name in _RANKS}
    candidates = {
        name: value
        for name, value in values.items()
        if isinstance(value, Tensor) and value.dim() == _RANKS[name] + 1
    }
    main = next((candidates[name] for name in PRIMARY if name in candidates), None)
    if main is None:
        return ()
    return tuple(
        prefix + name for name, value in candidates.items() if value.shape[:3] == main.shape[:3]
    )


def _position_ids_dim(tensor: Tensor, several: bool) -> int | None:
    """The dimension of requests: none in (T,), 0 in (B, T) and (B, C, T), 1 in (axes, B, T)."""
    return 0 if several else {0: None, 1: None, 2: 0}.get(tensor.dim(), 1)


#: Roles whose dimension depends on the tensor's rank, and on whether requests have several
#: sequences.
RANKED: Mapping[str, Callable[[Tensor, bool], int | None]] = {
    "position_ids": _position_ids_dim,
    "decoder_position_ids": _position_ids_dim,
}


@dataclass(frozen=True)
class Role:
    """A tensor argument's name, and the dimension of the requests, None if they share it.

    `known`: the dimension is known; `assumed`: only by convention. `several`: the dimension has
    equally many entries of each request, in turn. `request`: the tensor belongs only to this one of
    `requests`. `picks`: its values are indices of requests.
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
    """The roles of the arguments of a module's forward, or of its method `function`."""

    def __init__(
        self,
        module: nn.Module,
        row_dims: Mapping[str, RowDim],
        function: Callable[..., Any] | None = None,
        *,
        packed: bool = False,
    ) -> None:
        self._signature = inspect.signature(module.forward if function is None else function)
        self._row_dims: dict[str, RowDim] = dict(PACKED_DIMS if packed else row_dims)
        self.packed = packed
        #: Arguments already warned about.
        self._warned: set[str] = set()
        # Models with a main input name declare roles; for others batch first is the contract.
        self.declares_roles = hasattr(module, "main_input_name")

    def spread(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """`named`, with the items ("batch.x") of containers that have no role themselves."""
        items: dict[str, Any] = {}
        for name, value in named.items():
            parts = self.parts(name, value)
            items.update({name: value} if parts is None else self.spread(parts))
        return items

    def parts(self, name: str, value: Any) -> dict[str, Any] | None:
        """The items of an argument, each an argument itself; None if it is not taken apart."""
        known = name in self._row_dims or name.rpartition(".")[2] in ROW_DIMS
        if known or name.count(".") == _DEPTH:
            return None
        items = items_of(value)
        return None if items is None else {f"{name}.{key}": item for key, item in items.items()}

    def of_items(self, name: str, value: Any) -> bool:
        """Whether an argument is declared to have an item for each request."""
        return self._row_dims.get(name) == "items" and isinstance(value, (list, tuple))

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
                new: Any = {key: change(key, item) for key, item in value.items()}
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                new = tuple(change(f"{name}.{index}", item) for index, item in enumerate(value))
            else:
                new = change(name, value)
            bound.arguments[name] = new
        return bound.args, bound.kwargs

    def role(self, argument: str, tensor: Tensor, call: Mapping[str, Any]) -> Role:
        """The role of `tensor`, found in `argument` (or in a container) of `call`."""
        if argument in self._row_dims:
            dim = self._row_dims[argument]
            if self.of_items(argument, call.get(argument)):
                return _role_of_item(argument, tensor, call[argument])
            dim = BATCH_FIRST if dim == "items" else dim
            picks = self.packed and argument in PICKS and tensor.dim() == 1
            return Role(argument, dim, picks=picks)
        if tensor.dim() == 0:
            return Role(argument, None)
        name = argument.rpartition(".")[2]
        if name in RANKED:
            several = argument in choices(call, argument.removesuffix(name))
            return Role(argument, RANKED[name](tensor, several))
        if name in ROW_DIMS:
            return Role(argument, ROW_DIMS[name])
        if self.declares_roles and name in DECLARED_DIMS:
            return Role(argument, DECLARED_DIMS[name])
        if self.declares_roles:
            return Role(argument, None, known=False)
        return Role(argument, BATCH_FIRST, assumed=True)

    def check_rows(self, named: Mapping[str, Any], rows: int) -> None:
        """Raise BatchError for an argument with neither `rows` requests nor one, and warn if the
        dimension of requests is ambiguous."""
        named = self.spread(named)
        for name, value in self._tensors(named):
            role = self.role(name, value, named)
            if role.request is not None and role.requests != rows:
                raise BatchError(
                    f"argument {name!r} has {role.requests} items, and LoraConfig(row_dims={{"
                    f"{name!r}: 'items'}}) says that each is a request's; the call has {rows} "
                    f"requests{sizes_of(named)}"
                )
            if not role.known or role.dim is None:
                continue
            check_requests(name, value.shape, role.dim, rows, named)
            if not role.assumed or name in self._warned:
                continue
            if self._is_list_of(rows, name, named):
                warn_items(name.rpartition(".")[0], rows)
            elif not warn_ambiguous(name, value, rows):
                continue
            self._warned.add(name)

    def _is_list_of(self, rows: int, name: str, named: Mapping[str, Any]) -> bool:
        """Whether `name` is the first item of a list or tuple with as many items as requests."""
        parent, _, key = name.rpartition(".")
        parameter = self._signature.parameters.get(parent)
        if key != "0" or (parameter and parameter.kind is inspect.Parameter.VAR_POSITIONAL):
            return False
        return rows > 1 and f"{parent}.{rows - 1}" in named and f"{parent}.{rows}" not in named

    def _tensors(self, named: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """The tensors among arguments, and in containers whose dimension is declared."""
        for name, value in named.items():
            if isinstance(value, Tensor) or name in self._row_dims:
                yield from ((name, tensor) for tensor in tensor_leaves(value))

    def rows(self, named: Mapping[str, Any]) -> int | None:
        """The number of requests in the call; None if no argument carries any."""
        named = self.spread(named)
        for name, value in named.items():
            if self.of_items(name, value):
                return len(value)
        primary = (key for main in PRIMARY for key in named if key.rpartition(".")[2] == main)
        first = {name: named[name] for name in primary}
        for name, tensor in self._tensors({**first, **named}):
            role = self.role(name, tensor, named)
            if role.known and role.dim is not None and tensor.dim() > role.dim:
                return tensor.shape[role.dim]
        return None


def _role_of_item(argument: str, tensor: Tensor, items: Any) -> Role:
    """The role of a tensor in a list with an item for each request; unknown if several have it."""
    owners = [i for i, item in enumerate(items) if any(t is tensor for t in tensor_leaves(item))]
    if len(owners) != 1:
        return Role(argument, None, known=False)
    return Role(argument, None, request=owners[0], requests=len(items))


def items_of(value: Any) -> dict[Any, Any] | None:
    """The items of a dict, dataclass, list or tuple by key, field or index; None for anything else,
    and for a list without tensors or such items."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        holds = any(isinstance(item, Tensor) or items_of(item) is not None for item in value)
        return dict(enumerate(value)) if holds else None
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


_DEPTH = 8  # of nested containers; cache objects refer to much else besides tensors


def tensor_leaves(value: Any, *, objects: bool = True) -> Iterator[Tensor]:
    """The tensors in an argument, in containers, dataclasses and, with `objects`, in others such as
    caches, but not in modules."""
    seen: set[int] = set()

    def walk(item: Any, depth: int) -> Iterator[Tensor]:
        if isinstance(item, Tensor):
            yield item
            return
        if depth == 0 or id(item) in seen or isinstance(item, (str, bytes, int, float, nn.Module)):
            return
        seen.add(id(item))
        items = items_of(item)
        if items is not None:
            children = list(items.values())
        elif isinstance(item, (list, tuple, set)):
            children = list(item)
        else:
            children = list(getattr(item, "__dict__", {}).values()) if objects else []
        for child in children:
            yield from walk(child, depth - 1)

    yield from walk(value, _DEPTH)


def check_names(row_dims: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ConfigError for a name in `LoraConfig.row_dims` that no method of the model and no
    forward in it takes, or that looks misspelt. A dot precedes the key of a dict."""
    known = {*ROW_DIMS, *RANKED}
    functions = [getattr(module.forward, "__func__", module.forward) for module in model.modules()]
    methods = (getattr(type(model), name) for name in dir(type(model)) if not name.startswith("_"))
    for function in dict.fromkeys([*functions, *filter(inspect.isfunction, methods)]):
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # written in C
            continue
        known |= {parameter.name for parameter in parameters}
    taken = inspect.signature(model.forward).parameters.values()
    any_name = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken)
    for name in row_dims:
        first = name.partition(".")[0]
        suggestion = nearest(first, known, cutoff=_MISSPELT)
        if first not in known and (suggestion or not any_name):
            raise ConfigError(
                f"LoraConfig.row_dims names {name!r}, which no method of "
                f"{type(model).__name__} takes{suggestion}; its forward takes "
                f"{', '.join(parameter.name for parameter in taken)}. For an item of a dict, give "
                "'argument.key'"
            )


#: Similarity at which a name counts as misspelt.
_MISSPELT = 0.8
