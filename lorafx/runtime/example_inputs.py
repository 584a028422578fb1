"""Example inputs of a model: the user's, or token ids made from its configuration, and variants of
them with other numbers of requests and tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.errors import ConfigError
from lorafx.model.targets import input_embedding
from lorafx.program.argument_roles import PRIMARY, TOKEN_DIMS, RoleTable, tensor_leaves
from lorafx.registry import lookup

#: The names of the cache, both in a model's output and among its arguments.
_CACHES = ("cache", "past_key_values", "cache_params")
#: Arguments that `generate` makes itself.
_MADE_BY_GENERATE = ("labels", "position_ids", "cache_position", *_CACHES)


@dataclass(frozen=True)
class Example:
    """A call's arguments by name. `length` is the number of tokens, None if it takes none."""

    roles: RoleTable
    named: Mapping[str, Any]
    rows: int
    length: int | None

    @classmethod
    def of(cls, roles: RoleTable, named: Mapping[str, Any]) -> Example:
        """The example of these arguments."""
        given = {name: named[name] for name in PRIMARY if isinstance(named.get(name), Tensor)}
        tokens = [
            value.shape[TOKEN_DIMS[name]]
            for name, value in given.items()
            if name in TOKEN_DIMS and value.dim() > TOKEN_DIMS[name]
        ]
        return cls(roles, named, roles.rows(named) or 1, tokens[0] if tokens else None)

    def __str__(self) -> str:
        tokens = "" if self.length is None else f" of {self.length} tokens"
        return f"{self.rows} request{'s' if self.rows > 1 else ''}{tokens}"

    @property
    def can_generate(self) -> bool:
        """Whether a prompt is among the arguments."""
        return any(name in self.named for name in PRIMARY)

    def prompt(self) -> dict[str, Any]:
        """The arguments that `generate` takes."""
        return {
            name: value
            for name, value in self.named.items()
            if isinstance(value, Tensor)
            and name not in _MADE_BY_GENERATE
            and not name.startswith("decoder_")
        }

    def padded(self) -> Example | None:
        """The example with prompts of unequal lengths; None if it has one prompt, or no mask.

        `generate` drops a mask without padding, which takes another graph.
        """
        mask = self.named.get("attention_mask")
        if self.rows < 2 or not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < 2:
            return None
        mask = mask.clone()
        mask[1::2, 0] = 0
        return replace(self, named={**self.named, "attention_mask": mask})

    def variants(self, batch_sizes: Sequence[int], lengths: Sequence[int]) -> Iterator[Example]:
        """The example, then one for each other number of requests and of tokens."""
        yield self
        if any(list(tensor_leaves(v)) for v in self.named.values() if not isinstance(v, Tensor)):
            return  # containers, such as caches, are not resized
        seen = {(self.rows, self.length)}
        for rows in batch_sizes if self.roles.rows(self.named) else (self.rows,):
            for length in lengths if self.length is not None else (None,):
                if (rows, length) not in seen:
                    seen.add((rows, length))
                    named = {k: self._resized(k, v, rows, length) for k, v in self.named.items()}
                    yield replace(self, named=named, rows=rows, length=length)

    def _resized(self, name: str, value: Any, rows: int, length: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        role = self.roles.role(name, value, self.named)
        resized = value
        if role.known and _has_size(value, role.dim, self.rows):
            resized = _repeated(resized, role.dim, rows)
        if length is not None and _has_size(value, TOKEN_DIMS.get(name), self.length):
            resized = _repeated(resized, TOKEN_DIMS[name], length)
        return resized


def _has_size(tensor: Tensor, dim: int | None, size: int | None) -> bool:
    return dim is not None and tensor.dim() > dim and tensor.shape[dim] == size


def _repeated(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    assert dim is not None
    index = torch.arange(size, device=tensor.device) % max(tensor.shape[dim], 1)
    return tensor.index_select(dim, index)


def example_of(roles: RoleTable, inputs: Any) -> Example:
    """The example of a call's arguments, given by name or by position. Raises ConfigError if they
    are given in another form, or do not fit the forward."""
    args, kwargs = as_call(inputs)
    try:
        return Example.of(roles, roles.bind(args, kwargs))
    except TypeError as error:
        raise ConfigError(f"example_inputs do not fit the model's forward: {error}") from error


def as_call(
    inputs: Mapping[str, Any] | Sequence[Any],
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The positional and the keyword arguments of a call, from a sequence or a mapping. Raises
    ConfigError if `inputs` is neither."""
    if isinstance(inputs, Mapping):
        return (), inputs
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(inputs), {}
    raise ConfigError(
        "inputs are the arguments of a call: a mapping of names to values, or a list or tuple of "
        f"those in their order, also where there is one; got a {type(inputs).__name__}"
    )


def named_inputs(roles: RoleTable, inputs: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """The arguments of a call by name, from a sequence or a mapping. Raises ConfigError if `inputs`
    is neither, TypeError if there are more than the forward takes."""
    args, kwargs = as_call(inputs)
    return dict(roles.bind(args, {}) if args else kwargs)


def derived_example(model: nn.Module, device: torch.device, rows: int, length: int) -> Example:
    """An example of `rows` requests with `length` tokens each. Raises ConfigError if the model
    takes something else than token ids, or its vocabulary is not known."""
    parameters = inspect.signature(model.forward).parameters
    if getattr(model, "main_input_name", None) != "input_ids" or "input_ids" not in parameters:
        raise ConfigError(
            f"inputs for {type(model).__name__} cannot be derived, since it does not "
            "declare token ids as its main input; pass the arguments of a call as "
            "warmup(example_inputs=...)"
        )
    config = getattr(model, "config", None)
    special = {
        value
        for name, value in vars(config).items()
        if name.endswith("token_id") and isinstance(value, int)
    }
    ids = [i for i in range(min(_vocabulary(model), 64)) if i not in special] or [0]
    flat = [ids[i % len(ids)] for i in range(rows * length)]
    tokens = torch.tensor(flat, device=device).view(rows, length).clone()
    named: dict[str, Any] = {"input_ids": tokens}
    if "attention_mask" in parameters:
        named["attention_mask"] = torch.ones_like(tokens)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        named["decoder_input_ids"] = tokens.clone()
    return Example.of(RoleTable(model, {}), named)


def _vocabulary(model: nn.Module) -> int:
    """The number of token ids that the model's input embedding has rows for."""
    embedding = input_embedding(model)
    entry = None if embedding is None else lookup(embedding)
    if embedding is None or entry is None or entry.kind != "embedding":
        raise ConfigError(
            f"the input embedding of {type(model).__name__} does not tell its vocabulary; "
            "pass the arguments of a call as warmup(example_inputs=...)"
        )
    return entry.sizes(embedding)[0]


def decode_step(model: nn.Module, inputs: Mapping[str, Any], output: Any) -> dict[str, Any] | None:
    """The arguments of a call for one more token, with the cache in `output`; None if there is no
    cache, or the model is an encoder-decoder."""
    ids, parameters = inputs.get("input_ids"), inspect.signature(model.forward).parameters
    if not isinstance(ids, Tensor) or ids.shape[-1] < 2 or "decoder_input_ids" in inputs:
        return None  # a cache of one token would need a graph of its own
    for name in _CACHES:
        cache = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if cache is None or name in inputs or name not in parameters:
            continue
        step = {"input_ids": ids[:, -1:], name: cache}
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            step["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return step
    return None
