"""The requests of a call: the adapters that it names, the one of each row of its batch, and checks
of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorafx.adapter_store.names import BASE, AdapterName, one_name
from lorafx.errors import BatchError, ConfigError, numbered
from lorafx.program.argument_checks import sizes_of
from lorafx.program.argument_roles import PRIMARY, TOKEN_DIMS, RoleTable, new_tokens
from lorafx.program.frame import PER_REQUEST, SlotForm
from lorafx.program.program import Call

Names = Sequence["str | None"]

#: Arguments that index an embedding.
_IDS = ("input_ids", "decoder_input_ids", "token_type_ids")
_TENSORS = frozenset((*PRIMARY, *TOKEN_DIMS, *_IDS, "decoder_attention_mask"))
#: Arguments with one number for each token.
_TOKENS = (*TOKEN_DIMS, "labels")


def _misfit_error(names: int, rows: int, arguments: str) -> BatchError:
    return BatchError(
        f"adapter_names has {numbered(names, 'entry', 'entries')}, but the batch has "
        f"{numbered(rows, 'row')}; give one name, or None for the base model, per row, or declare "
        "which dimension holds the requests with LoraConfig(row_dims={argument: dim}), 'items' for "
        f"a list of one tensor per request{arguments}"
    )


class Requests(NamedTuple):
    """The requests of a call, and their adapters.

    Attributes:
        names: the adapter of each request; None is the base.
        tokens: (B, T), the index into `names` of each token's adapter, -1 for the base, or (B, T,
            k), those of its gates; None where all tokens of a request use the same adapter.
        uniform: `names` has a single entry, which is the adapter of every row.
        packed: the tokens, (1, T), are those of several sequences, each of them a request.
        all_tokens: an aLoRA adapter is active for all tokens of its request.
        serve: runs a forward with these arguments inside of `generate`, where requests are prompts,
            and finds whose its rows are.
        owners: the prompt of each request of such a forward.
        weights: (B, T, k) float32, the weight of each gate, 0 where it names the base; or (B, T,
            L, k), those at each of L `layers`, the paths of sites.
    """

    names: tuple[str | None, ...]
    tokens: Tensor | None = None
    uniform: bool = False
    packed: bool = False
    all_tokens: bool = False
    serve: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any] | None = None
    owners: tuple[int, ...] | None = None
    weights: Tensor | None = None
    layers: tuple[str, ...] = ()

    @property
    def slot_form(self) -> SlotForm:
        """How graphs get their slots, which names alone may change (`form_of_names`). One token
        each with gates is a request."""
        if self.tokens is None:
            return PER_REQUEST
        if self.weights is None:
            return SlotForm(per_token=True)
        return SlotForm(self.tokens.shape[1] > 1, self.weights.shape[-1], layers=self.layers)

    @property
    def tokens_known(self) -> bool:
        """Whether it is known for which tokens an aLoRA adapter is active."""
        return self.all_tokens or self.tokens is not None

    @property
    def is_plain(self) -> bool:
        """Whether they are what `adapter_names` of a call says, and no more."""
        return self.tokens is None and not (self.uniform or self.all_tokens or self.serve)

    def part(self, rows: Sequence[int]) -> Requests:
        """The requests of some rows of the batch."""
        if self.tokens is not None:
            weights = None if self.weights is None else self.weights[list(rows)]
            return self._replace(tokens=self.tokens[list(rows)], weights=weights)
        return self._replace(names=tuple(self.names[row] for row in rows))

    def check_prompts(self, prompts: Any) -> None:
        """Raise BatchError unless there is a name for each row of `prompts`, from which `generate`
        makes more rows later (beams, sequences)."""
        known = isinstance(prompts, Tensor) and prompts.dim() and not self.uniform
        if known and len(self.names) != len(prompts):
            raise _misfit_error(len(self.names), len(prompts), "")

    def of_rows(self, rows: int | None, *, call: Call | None = None) -> Names:
        """The adapter of each of so many rows; None: no argument of the call carries requests.
        Errors name the arguments of `call`.

        Raises:
            BatchError: names and rows do not fit together.
        """
        names = self.names
        if self.uniform:
            return names * (rows or 1)
        if rows is None:
            if len(set(names)) > 1:
                raise BatchError(
                    "no argument of this call carries requests, so its rows cannot use "
                    "different adapters; declare which one does with "
                    f"LoraConfig(row_dims={{argument: dim}}){_sizes_text(call)}"
                )
            return names[:1]
        if rows == len(names):
            return names
        raise _misfit_error(len(names), rows, _sizes_text(call))

    def used(self) -> dict[int, str | None]:
        """The adapters that tokens use, by their indices into `names`; -1 is the base."""
        assert self.tokens is not None
        places = self.tokens.unique().tolist()
        return {place: self.names[place] if place >= 0 else None for place in places}

    def of_tokens(self, slots: Mapping[int, int]) -> Tensor:
        """The slot of each token, int32 (B · T,), one request after another, by those of `used`;
        with gates (k, B · T)."""
        assert self.tokens is not None
        by_place = [slots.get(place, -1) for place in range(-1, len(self.names))]
        # A table on tensors: a loop over 8,192 tokens takes a millisecond.
        table = torch.tensor(by_place, dtype=torch.int32)
        by_token = table.index_select(0, self.tokens.flatten().int() + 1)
        return (
            by_token
            if self.weights is None
            else by_token.view(-1, self.weights.shape[-1]).T.contiguous()
        )


def _sizes_text(call: Call | None) -> str:
    return "" if call is None else sizes_of(call.named)


def served_by(merged: str, requests: Requests) -> Requests:
    """The requests of a call as the model serves them with the adapter `merged` in its weights.

    Raises:
        BatchError: a request, or a token, uses something else than `merged`.
    """
    if requests.uniform:
        return requests
    tokens = requests.tokens
    if requests.weights is not None:
        raise BatchError(
            f"{merged!r} is merged into the base weights, so no token can have a part of it; call "
            "unmerge() to serve adapter_gates"
        )
    used = requests.names if tokens is None else requests.used().values()
    others = dict.fromkeys(name for name in used if name != merged)
    if others:
        listed = ", ".join("the base model" if n in (None, BASE) else repr(n) for n in others)
        raise BatchError(
            f"{merged!r} is merged into the base weights, but this call asks for {listed}; "
            f"call unmerge() to serve adapters side by side, or name {merged!r} or nothing"
        )
    if requests.packed:
        return Requests((merged,), uniform=True)
    return requests if tokens is None else Requests((merged,) * tokens.shape[0])


def check_tokens(tokens: Tensor, roles: RoleTable, named: Mapping[str, Any]) -> None:
    """Raise BatchError unless the arguments have as many tokens as `tokens`, (B, T)."""
    rows, length = tokens.shape[:2]
    roles.check_rows(named, rows)
    for name, dim in new_tokens(named).items():
        value = named[name]
        if roles.role(name, value, named).dim == 0 and value.shape[dim] != length:
            raise BatchError(
                f"{'adapter_slots has' if tokens.dim() == 2 else 'adapter_gates have'} shape "
                f"{tuple(tokens.shape)}, and {name!r} {tuple(value.shape)}; give one slot for each "
                "token of the call. Tokens that are in a cache already have none"
            )


def alora_refusal(name: str, invocation: Sequence[int]) -> BatchError:
    """The error for an aLoRA adapter in a call whose token ids are not searched."""
    return BatchError(
        f"{name!r} is an aLoRA adapter, which is active from its invocation tokens "
        f"{list(invocation)} on. They are looked for in the input_ids of calls of a compiled model "
        "(lorafx.compile), of generate() and of continuous batching, and not here: call one of "
        "those, or give the adapter of each token with adapter_slots=, shape (B, T)"
    )


def requests_of(
    names: Sequence[AdapterName] | Requests | None,
    slots: Tensor | None = None,
    loaded: Sequence[str] = (),
) -> Requests | None:
    """The requests of a call with these `adapter_names` and `adapter_slots`; None if both are None.
    Without names, slots are indices into the `loaded` adapters.

    Raises:
        ConfigError, BatchError: as `checked_names`.
        BatchError: `slots` has another shape or dtype, or indices out of range.
    """
    if isinstance(names, Requests):  # of a block of `lorafx.adapters`
        return names
    checked = checked_names(names)
    if slots is None:
        return None if checked is None else Requests(checked)
    names = loaded if checked is None else checked
    if not isinstance(slots, Tensor):
        raise BatchError(f"adapter_slots must be a tensor of integers, got {slots!r:.80}")
    if slots.dim() not in (1, 2) or slots.is_floating_point() or not slots.numel():
        raise BatchError(
            "adapter_slots must hold integers of shape (B,) or (B, T), got "
            f"{tuple(slots.shape)} {slots.dtype}"
        )
    slots = slots.cpu()
    if not -1 <= int(slots.min()) <= int(slots.max()) < len(names):
        raise BatchError(
            f"adapter_slots holds {int(slots.min())} to {int(slots.max())}, but there are "
            f"{len(names)} adapters to point at ({', '.join(map(str, names)) or 'none'}); "
            "-1 is the base model"
        )
    by_token = slots.dim() == 2
    by_request = slots[:, 0] if by_token else slots
    if by_token and bool((slots != by_request[:, None]).any()):
        return Requests(tuple(names), slots)
    served = tuple(names[i] if i >= 0 else None for i in by_request.tolist())
    return Requests(served, all_tokens=by_token)


def checked_names(names: Sequence[AdapterName] | None) -> tuple[str | None, ...] | None:
    """`names`, in which each weighted sum of adapters is replaced by its name.

    Raises:
        ConfigError: they are not a list of names, or a mapping in it is not one of weights by name.
        BatchError: the list is empty.
    """
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ConfigError(
            f"adapter_names must be a list with one name, or None, per row; got {names!r}"
        )
    if not names:
        raise BatchError("adapter_names is empty; give one name, or None, per row")
    return tuple(one_name(name, f"adapter_names[{row}]") for row, name in enumerate(names))


#: The requests of the open blocks of `lorafx.adapters`, by the identity of the model.
IN_BLOCKS: ContextVar[Mapping[int, Requests]] = ContextVar(
    "lorafx.adapters", default=MappingProxyType({})
)
#: The thread of each open block, by model.
BLOCK_THREADS: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()


# --- arguments ---


def check_inputs(roles: RoleTable, named: Mapping[str, Any]) -> None:
    """Check the arguments, by name, of a call of the whole model.

    Raises:
        ConfigError: one is not a tensor, or not of integers, where it must be.
        BatchError: there are no rows, or no tokens.
    """
    if roles.declares_roles:
        check_tensors(named)
    if roles.rows(named) == 0:
        raise BatchError(f"this call has no rows: {_shapes(named)}; a batch has at least one")
    for name in PRIMARY:
        value, dim = named.get(name), TOKEN_DIMS.get(name)
        if isinstance(value, Tensor) and dim is not None:
            if roles.declares_roles and value.dim() > dim and not value.shape[dim]:
                raise BatchError(
                    f"{name} has shape {tuple(value.shape)}, which has no tokens; a call has at "
                    "least one per row"
                )
            return


def refuse_nested(named: Mapping[str, Any]) -> None:
    """Raise BatchError for a nested tensor, whose rows have no common length."""
    for name, value in named.items():
        if isinstance(value, Tensor) and value.is_nested:
            raise BatchError(
                f"{name} is a nested tensor, whose rows lorafx does not follow; pad them to one "
                "length, as by torch.nested.to_padded_tensor, and pass a mask"
            )


def check_tensors(named: Mapping[str, Any]) -> None:
    """Raise ConfigError if an argument of a known name is not a tensor, or ids are not integers."""
    for name, value in named.items():
        if isinstance(value, Tensor):
            if name in _IDS and value.is_floating_point():
                raise ConfigError(
                    f"{name} has dtype {value.dtype}, and an embedding looks it up: it holds "
                    f"integers; give {name}.long(). Vectors are given as inputs_embeds"
                )
        elif name in _TENSORS and _holds_numbers(value):
            raise ConfigError(
                f"{name} is a {type(value).__name__}, and the model takes a tensor: give "
                f"torch.as_tensor({name}); a tokenizer gives tensors with return_tensors='pt'"
            )


def _holds_numbers(value: Any) -> bool:
    """Whether a value is an array or a nested list of numbers, but not a list of tensors, which the
    model may take."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (int, float, list, tuple)) or hasattr(value, "__array__")


def _shapes(named: Mapping[str, Any]) -> str:
    tensors = ((name, value) for name, value in named.items() if isinstance(value, Tensor))
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors)


def plain_tokens(named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, in which token ids, masks and labels are int64, are not views, and share no
    memory; copies take 8 bytes per token. Dynamo guards on dtypes, strides, views and on a tensor
    that is passed twice, so `ids[:, -1:]` or `labels=ids` would need another graph."""
    seen: set[int] = set()
    plain = dict(named)
    for name, value in named.items():
        if name in _TOKENS and isinstance(value, Tensor):
            plain[name] = _plain_copy(value, shared=id(value) in seen)
            seen.add(id(value))
    return plain


def _plain_copy(value: Tensor, *, shared: bool) -> Tensor:
    if value.dtype == torch.int32:
        return value.to(torch.int64, memory_format=torch.contiguous_format)
    if (value._is_view() or shared) and value.dim() == 2 and not value.is_floating_point():
        return value.clone(memory_format=torch.contiguous_format)
    return value
