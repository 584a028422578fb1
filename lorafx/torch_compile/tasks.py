"""Whose a block of `lorafx.adapters` is, where several tasks of asyncio share a thread.

What a block sets is the thread's: graphs that run on it serve its requests. A task that awaits
inside of its block leaves it to others, which are neither in it, nor may they open one that would
end after it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorafx.errors import BatchError
from lorafx.program.stack import refuse_called_slips

#: How adapters are chosen for a model that its users call.
IN_A_BLOCK = "the names to a block around the call: with lorafx.adapters(model, [...])"


@dataclass(eq=False)
class _Block:
    task: asyncio.Task[Any] | None


class _Open(threading.local):
    def __init__(self) -> None:
        self.blocks: list[_Block] = []


#: The blocks of each thread, the innermost last.
_OPEN = _Open()
#: The innermost block of a task, and of those that it has started inside.
_INSIDE: ContextVar[_Block | None] = ContextVar("lorafx.adapters", default=None)


@contextmanager
def block_of_this_task() -> Iterator[None]:
    """Around a block. Raises BatchError where one of another task is open on this thread."""
    blocks, task = _OPEN.blocks, _task()
    if blocks and blocks[-1].task not in (None, task):
        raise _refusal("a block of lorafx.adapters is opened")
    block = _Block(task)
    blocks.append(block)
    before = _INSIDE.set(block)
    try:
        yield
    finally:
        blocks.remove(block)
        with suppress(ValueError):  # of a generator that another task has closed
            _INSIDE.reset(before)


class OtherTasks:
    """What marks of an attached model ask in eager mode, where no graph asks."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def refuse(self, path: str, layer: str) -> None:
        """Nothing: where no adapter is active a layer is the base's."""

    def refuse_slips(self) -> None:
        """As `refuse_called_slips`, of the model's call."""
        refuse_called_slips(lambda module: module is self._model, IN_A_BLOCK)

    def refuse_elsewhere(self) -> None:
        """As `refuse_other_tasks`."""
        refuse_other_tasks()


def refuse_other_tasks() -> None:
    """Raise BatchError where a graph, or a layer, runs in a task that is not in the innermost block
    of its thread."""
    blocks = _OPEN.blocks
    if not blocks or blocks[-1].task is None or _INSIDE.get() is blocks[-1]:
        return
    if _task() is not blocks[-1].task:
        raise _refusal("a model with LoRA is called")


def _task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop is running here
        return None


def _refusal(what: str) -> BatchError:
    return BatchError(
        f"{what} while another task of asyncio is inside of its block of lorafx.adapters on this "
        "thread, and would get its adapters. Do not await inside a block: open it around the call "
        "alone, in a function for asyncio.to_thread for example, or use lorafx.compile, whose "
        "calls take adapter_names"
    )
