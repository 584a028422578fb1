"""Tokens that were added to a vocabulary for some adapters: `generate` keeps them from other rows.

    scores[m, v] = −inf    for v ≥ base_vocab_size, unless the adapter of row m has a row of its own
                           for v, in an embedding or a head

A base model whose embeddings were resized has numbers for these tokens, which mean nothing to rows
that were not trained with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafx.errors import ConfigError
from lorafx.session.session import Session

_ARGUMENT = "logits_processor"
_POSITION = 2  # of generate(inputs, generation_config, logits_processor)


def without_added_tokens(
    session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `generate` with a processor of the scores beside those that are given."""
    size = session.program.config.base_vocab_size
    if size is None:
        return args, kwargs
    hiding = AddedTokens(session, size)
    if len(args) > _POSITION:
        given = [*(args[_POSITION] or []), hiding]
        return (*args[:_POSITION], given, *args[_POSITION + 1 :]), kwargs
    return args, {**kwargs, _ARGUMENT: [*(kwargs.get(_ARGUMENT) or []), hiding]}


def refuse_added_tokens(session: Session, what: str) -> None:
    """Raise ConfigError where tokens are to be kept from some rows, which `what` does not do."""
    if session.program.config.base_vocab_size is not None:
        raise ConfigError(
            f"{what} does not keep added tokens from rows that were not trained with them; compile "
            "without LoraConfig(base_vocab_size=...), or call generate()"
        )


class AddedTokens:
    """What transformers calls with the scores of each step, (rows, vocabulary)."""

    def __init__(self, session: Session, size: int) -> None:
        self._session, self._size = session, size
        self._hidden: Tensor | None = None  # (rows, vocabulary), for the rows of the last step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._hidden is None or self._hidden.shape != scores.shape:
            names = self._session.asked.of_rows(scores.shape[0], repeats=True)
            known = {name: self._of(name, scores.shape[1]) for name in dict.fromkeys(names)}
            self._hidden = torch.stack([known[name] for name in names]).to(scores.device)
        return scores.masked_fill(self._hidden, -torch.inf)

    def _of(self, name: str | None, count: int) -> Tensor:
        """Which tokens are kept from rows of an adapter, bool (vocabulary,)."""
        hidden = torch.arange(count) >= self._size
        store = self._session.store
        if name is None or name not in store:
            return hidden
        for group, weight in store.numbers(name).own.items():
            if self._session.program.groups[group].sites[0].weight_rows != count:
                continue  # no weight of the vocabulary
            if weight.at is None:  # an embedding may have fewer than the base
                hidden[: len(weight.rows)] = False
            else:
                hidden[weight.at.long()] = False
        return hidden
