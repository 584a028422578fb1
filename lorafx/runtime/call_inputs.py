"""What a call of the model is given, looked at before anything runs.

| given | what happens |
|---|---|
| token ids, masks, positions of 32-bit integers | taken as 64-bit ones: one graph serves both |
| a list or an array where the model declares a tensor of requests or tokens | refused |
| token ids that are no integers | refused |
| no rows, or no tokens | refused |

Arguments of other names are the model's business. A model declares roles by `main_input_name`, as
those of transformers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorafx.errors import BatchError, ConfigError
from lorafx.program.argument_roles import PRIMARY, TOKEN_DIMS, RoleTable

#: Arguments that an embedding looks up.
_IDS = ("input_ids", "decoder_input_ids", "token_type_ids")
_TENSORS = frozenset((*PRIMARY, *TOKEN_DIMS, *_IDS, "decoder_attention_mask"))


def check_inputs(roles: RoleTable, named: Mapping[str, Any]) -> None:
    """Look at the arguments of a call of the whole model, by name.

    Raises:
        ConfigError: one is no tensor, or holds no integers where it should.
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


def check_tensors(named: Mapping[str, Any]) -> None:
    """Raise ConfigError where an argument of a known name is no tensor, or token ids no
    integers."""
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
    """Whether it is an array, or a list with nothing but numbers at its end. A list of tensors may
    be what the model asks for."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (int, float, list, tuple)) or hasattr(value, "__array__")


def _shapes(named: Mapping[str, Any]) -> str:
    tensors = ((name, value) for name, value in named.items() if isinstance(value, Tensor))
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors)


#: Arguments with a number for each token.
_TOKENS = (*TOKEN_DIMS, "labels")


def plain_tokens(named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with token ids, masks and labels that are views copied, 8 bytes per token, and
    those of 32 bits as 64. Dynamo guards on dtypes, on strides and on what a tensor is a view of,
    so `ids[:, -1:]` would cause a graph. So would a tensor that is given twice, as in
    `labels=ids`: Dynamo guards on that, too."""
    given: set[int] = set()
    plain = dict(named)
    for name, value in named.items():
        if name in _TOKENS and isinstance(value, Tensor):
            plain[name] = _plain(value, shared=id(value) in given)
            given.add(id(value))
    return plain


def _plain(value: Tensor, *, shared: bool) -> Tensor:
    if value.dtype == torch.int32:
        return value.to(torch.int64, memory_format=torch.contiguous_format)
    if (value._is_view() or shared) and value.dim() == 2 and not value.is_floating_point():
        return value.clone(memory_format=torch.contiguous_format)
    return value
