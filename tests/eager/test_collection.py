"""Python collects no garbage inside of an eager forward, only what it has made inside of a
generate, and as before when they have ended."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, error
from interrupting import every_place
from torch import Tensor, nn

from lorafx.runtime.collection import collection_of_new, collection_paused

K = 6


class Littering(nn.Module):
    """Makes more garbage than Python leaves uncollected, and notes what is collected meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, K)

    def forward(self, x: Tensor, fails: bool = False) -> dict[str, Tensor]:
        collected = 0

        def note(phase: str, info: dict[str, int]) -> None:
            nonlocal collected
            collected += phase == "stop"

        gc.callbacks.append(note)
        for _ in range(2 * gc.get_threshold()[0]):
            ring: list[object] = []
            ring.append(ring)
        gc.callbacks.remove(note)
        if fails:
            raise ValueError("as its caller asked")
        return {"logits": self.w(x), "collected": torch.full((len(x),), collected)}


@pytest.fixture(params=[True, False], ids=["collecting", "not collecting"])
def collecting(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the caller lets Python collect, whatever an interrupted test has left."""
    gc.enable() if request.param else gc.disable()
    yield request.param
    gc.enable()


def test_an_eager_forward_is_not_interrupted(small: Callable[..., Case], collecting: bool) -> None:
    case = small(Littering, ["w"])
    cm: Any = case.compile({**REFERENCE, "start": "eager", "cache": None})
    x, names = torch.randn(3, K), ["a", None, "b"]
    assert bool(case.base(x)["collected"].sum()) == collecting  # without lorafx
    for _ in range(2):
        got = cm(x, adapter_names=names)
        assert error(got["logits"], case.expected(names, {"x": x})) <= TOLERANCE
        assert not got["collected"].sum()
        assert gc.isenabled() == collecting
    with pytest.raises(ValueError, match="as its caller asked"):
        cm(x, fails=True, adapter_names=names)
    assert gc.isenabled() == collecting


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    """As in a user's process: tests freeze what earlier ones left."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_a_generate_collects_what_it_has_made(llama: Case) -> None:
    cm: Any = llama.compile({**REFERENCE, "start": "eager", "cache": None})
    frozen: list[int] = []
    hook = cm._orig_mod.lm_head.register_forward_pre_hook(
        lambda *_: frozen.append(gc.get_freeze_count())
    )
    ids = torch.ones(2, 3, dtype=torch.long)
    cm.generate(ids, max_new_tokens=2, do_sample=False, adapter_names=["a1", None])
    hook.remove()
    assert len(frozen) == 2
    assert all(frozen)
    assert not gc.get_freeze_count()


@pytest.mark.usefixtures("nothing_frozen")
@pytest.mark.parametrize("block", [collection_paused, collection_of_new])
def test_an_interrupt_leaves_collection_on(block: Callable[[], Any]) -> None:
    def entered() -> None:
        with block():
            assert not gc.isenabled() or gc.get_freeze_count()

    places = 0
    for place, _ in every_place(entered):
        assert gc.isenabled(), place
        assert not gc.get_freeze_count(), place
        places += 1
    assert places > 2
