"""Blocks of `lorafx.adapters` around the first call of a model that this call will mark."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from lorafx.capture.tracking import Tracking
from lorafx.errors import ConfigError

if TYPE_CHECKING:
    from lorafx.serving.attached import AttachedSession


@dataclass(eq=False)
class Pending:
    """A block around calls of a model that will be marked when its first frame is captured."""

    model: nn.Module
    names: str | Sequence[str | None] | None
    tracking: Tracking = field(default_factory=Tracking)
    entered: ExitStack = field(default_factory=ExitStack)
    begun: bool = False

    def begin(self, session: AttachedSession) -> None:
        """Serve the block's adapters from now on."""
        self.entered.enter_context(session.block(self.names, self.tracking))
        self.begun = True


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
