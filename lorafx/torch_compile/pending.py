"""Blocks of `lorafx.adapters` around the first call of a model that this call will mark."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import nn

from lorafx.capture.tracking import Tracking
from lorafx.errors import ConfigError
from lorafx.interrupts import free_after_fork


@dataclass(eq=False)
class Pending:
    """A block around calls of a model that will be marked when its first frame is captured."""

    model: nn.Module
    names: str | Sequence[str | None] | None
    tracking: Tracking = field(default_factory=Tracking)
    entered: ExitStack = field(default_factory=ExitStack)
    begun: bool = False

    def begin(self, block: AbstractContextManager[None]) -> None:
        """Be this block of the session from now on."""
        self.entered.enter_context(block)
        self.begun = True


#: A block of such a model holds its lock as long as it lasts. The session's own lock is taken
#: while Dynamo captures, so a thread that waited for it there would keep Dynamo from all others.
_FIRST_CALLS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def first_call(model: nn.Module, marked: bool) -> threading.RLock:
    """What a block of this model holds, so that one thread at a time makes a first call. Of a model
    that was marked before any block it is a lock of nobody else's."""
    lock = threading.RLock()
    return _FIRST_CALLS.get(model, lock) if marked else _FIRST_CALLS.setdefault(model, lock)


def _after_fork() -> None:
    for model, lock in list(_FIRST_CALLS.items()):
        _FIRST_CALLS[model] = free_after_fork(lock)


os.register_at_fork(after_in_child=_after_fork)


class _PendingBlocks(threading.local):
    def __init__(self) -> None:
        self.blocks: list[Pending] = []


_PENDING = _PendingBlocks()


def pending_blocks(model: nn.Module) -> list[Pending]:
    """The blocks of this thread that wait for `model` to be marked, the outermost first."""
    return [block for block in _PENDING.blocks if block.model is model and not block.begun]


def waiting() -> bool:
    """Whether some block of this thread waits for its model to be marked."""
    return any(not block.begun for block in _PENDING.blocks)


@contextmanager
def until_marked(model: nn.Module, names: str | Sequence[str | None] | None) -> Iterator[None]:
    """A block of a model that torch.compile was given `lora_config` for, before its first call.

    Raises:
        ConfigError: at the end, where no call has marked the model.
    """
    block = Pending(model, names)
    _PENDING.blocks.append(block)
    with block.entered as settings:
        block.tracking.begin(settings)
        try:
            yield
        finally:
            _PENDING.blocks.remove(block)
    if not block.begun:
        raise ConfigError(
            f"no call inside the block has given this {type(model).__name__} LoRA: it was not "
            'called, or not compiled with backend="lorafx" and lora_config among its options. '
            "lorafx.attach(model, lora_config) marks a model before it is called"
        )
