"""Blocks of `lorafx.adapters` of several threads, and of tasks of asyncio on one thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
from attached import attached, check, check_base, compiled, fresh_dynamo, served
from dense_merge import error
from tiny_models import FAMILIES

import lorafx
from lorafx.errors import BatchError

__all__ = ["fresh_dynamo"]
feed = FAMILIES["plain"].inputs


def test_blocks_of_several_threads_wait_for_one_another(plain):
    torch.manual_seed(0)
    model, inputs = attached(plain), feed(3, 4)
    call = compiled(model, dynamic=False)
    mixes = (["a0", None, "a1"], ["a3", "a3", None], [None, "a2", "a0"])
    wanted = [plain.expected(names, inputs) for names in mixes]
    check(call, model, plain, mixes[0], inputs)
    errors: list[float] = []

    def serve(index: int) -> None:
        for _ in range(20):
            errors.append(error(served(call, model, mixes[index], inputs), wanted[index]))

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 60
    assert max(errors) <= 1e-5


def test_tasks_of_asyncio_that_await_inside_a_block(plain):
    """Another one would get its adapters, and so would all calls after blocks that end in another
    order than they began."""
    model, inputs = attached(plain), feed(2, 4)
    call, names = compiled(model, dynamic=False), ["a0", None]
    check(call, model, plain, names, inputs)

    async def inside() -> None:
        with torch.no_grad(), lorafx.adapters(model, names):
            await asyncio.sleep(0)
            got = call(**inputs)["logits"]
            sub_task = asyncio.create_task(calls())
            assert torch.equal(got, await sub_task)
        assert error(got, plain.expected(names, inputs)) <= 1e-5

    async def calls() -> torch.Tensor:
        with torch.no_grad():
            return call(**inputs)["logits"]

    async def opens() -> None:
        with lorafx.adapters(model, ["a1", "a2"]):
            pass

    async def both(other: Callable[[], Awaitable[Any]]) -> None:
        first, second = asyncio.create_task(inside()), asyncio.create_task(other())
        with pytest.raises(BatchError, match="Do not await inside a block"):
            await second
        await first

    for other in (calls, opens):
        asyncio.run(both(other))
    call, names = model, ["a0", "a0"]  # not compiled: one adapter a block
    asyncio.run(both(calls))
    with lorafx.adapters(model, ["a1", "a2"]):  # around a loop of its own
        asyncio.run(inside())
    check_base(call, plain, inputs)
