"""The adapters that a call names, checked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorafx.adapter_store.store import BASE
from lorafx.errors import BatchError, ConfigError

Names = Sequence["str | None"]


def served_by(merged: str, names: Names | None, tokens: Tensor | None) -> tuple[Names | None, None]:
    """The requests of a call of a model into which `merged` is merged, which serves all of them.

    Raises:
        BatchError: a request, or a token, uses something else.
    """
    used = names
    if tokens is not None:
        assert names is not None
        used = [names[i] if i >= 0 else None for i in tokens.flatten().tolist()]
    others = dict.fromkeys(name for name in used or () if name != merged)
    if others:
        said = ", ".join("the base model" if n in (None, BASE) else repr(n) for n in others)
        raise BatchError(
            f"{merged!r} is merged into the base weights, but this call asks for {said}; "
            f"call unmerge() to serve adapters side by side, or name {merged!r} or nothing"
        )
    return (names if tokens is None else [merged] * tokens.shape[0]), None


def checked_names(names: Sequence[str | None] | None) -> Sequence[str | None] | None:
    """`names` as given, once it is known to be a list of names.

    Raises:
        ConfigError: it is not; BatchError: it is empty.
    """
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ConfigError(
            f"adapter_names must be a list with one name, or None, per row; got {names!r}"
        )
    if not names:
        raise BatchError("adapter_names is empty; give one name, or None, per row")
    for row, name in enumerate(names):
        if name is not None and not isinstance(name, str):
            raise ConfigError(
                f"adapter_names[{row}] is {name!r}; give a name, or None for the base model"
            )
    return names


def by_slots(
    slots: Tensor, names: Sequence[str | None]
) -> tuple[Sequence[str | None], Tensor | None]:
    """(names, slots per token), or (a name per request, None) where no row mixes adapters.

    Raises:
        BatchError: `slots` does not point at `names`.
    """
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
    by_request = slots if slots.dim() == 1 else slots[:, 0]
    if slots.dim() == 1 or bool((slots == by_request[:, None]).all()):
        return [names[i] if i >= 0 else None for i in by_request.tolist()], None
    return names, slots
