"""An interrupt at any place of any operation: nothing waits for ever, and what is served is what
was before, or what should be afterwards; never something between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from dense_merge import REFERENCE, error, save_adapter
from interrupting import elsewhere, every_place
from torch import Tensor, nn

import lorafx
from lorafx.errors import CaptureError
from lorafx.runtime.running import IDLE

K = 6
NAMES = ["a", None, "b", "c"]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, 8), nn.Linear(8, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def made(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Two().eval().requires_grad_(False)


#: Version of the base weights, of each adapter (None: it is not loaded), and who is merged.
State = tuple[int, Mapping[str, int | None], str | None]


@dataclass
class World:
    """A compiled model, two sets of base weights, two of each adapter, and what is right."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    slots: int = 3

    def __post_init__(self) -> None:
        self.bases = [made(0), made(1)]
        self.x = torch.randn(len(NAMES), 2, K)
        self.files = {
            (name, version): save_adapter(
                self.bases[0],
                self.folder / f"{name}{version}",
                rank=rank,
                targets=["up", "down"] if name != "b" else ["up"],
                seed=10 * rank + version,
                **(self.config if name == "a" else {}),
            )
            for name, rank in (("a", 2), ("b", 3), ("c", 1))
            for version in (0, 1)
        }
        self.rows: dict[tuple[int, str | None, int], Tensor] = {}
        self.cm = lorafx.compile(
            made(0),
            lorafx.LoraConfig(max_adapters=self.slots, use_dora=bool(self.config)),
            adapters={name: self.files[name, 0] for name in "abc"},
            options=REFERENCE,
        )
        self.answer()
        self.cm(self.x, adapter_names=NAMES)  # four rows make a graph of their own
        self.cm(self.x[:2], adapter_names=[None, None])  # what a merged model runs

    def weights(self, version: int) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in self.bases[version].state_dict().items()}

    def pairs(self, version: int) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights(version).items()

    def row(self, base: int, name: str | None, version: int) -> Tensor:
        """All rows of x with this adapter."""
        key = base, name, version
        if key not in self.rows:
            model = self.bases[base]
            if name is not None:
                model = oracle.merged(model, self.files[name, version])
            with torch.no_grad():
                self.rows[key] = torch.cat([model(x[None]) for x in self.x])
        return self.rows[key]

    def expected(self, state: State) -> Tensor:
        base, versions, merged = state
        found = []
        for index, name in enumerate(NAMES):
            used = merged or name
            version = versions[used] if used else 0
            assert version is not None
            found.append(self.row(base, used, version)[index])
        return torch.stack(found)

    def answer(self) -> Tensor:
        """A mixed batch; of a merged model its only one."""
        names = None if self.cm.merged else NAMES
        rows = [
            self.cm(self.x[i : i + 2], adapter_names=names and names[i : i + 2]) for i in (0, 2)
        ]
        return torch.cat(rows)

    def is_one_of(self, *states: State) -> None:
        """The model serves one of these states, also on other threads."""
        got = elsewhere(self.answer)
        assert self.cm._session.running is IDLE
        merged = self.cm.merged
        errors = [error(got, self.expected(state)) for state in states if state[2] == merged]
        assert min(errors, default=torch.inf) <= 1e-5, errors

    def reset(self, merged: str | None = None) -> None:
        """State (0, all 0, merged)."""
        cm = self.cm
        if cm.merged:
            cm.unmerge()
        cm.set_adapter(None)
        cm.load_weights(self.weights(0))
        for name in "abc":
            cm.load_adapter(self.files[name, 0], name)
            cm.unpin_adapter(name)
        if merged:
            cm.merge(merged)
        self.answer()


OLD = {"a": 0, "b": 0, "c": 0}


@dataclass(frozen=True)
class Act:
    """An operation, what it begins with, the states that it may leave, and how many places of it
    one test skips between two that it interrupts."""

    run: Callable[[World], Any]
    after: tuple[State, ...] = ()
    merged: str | None = None
    step: int = 1


ACTS = {
    "call": Act(World.answer, step=41),
    "another call": Act(lambda w: w.cm(w.x, adapter_names=["c", "b", None, "c"]), step=29),
    "set_adapter": Act(lambda w: w.cm.set_adapter("b")),
    "load": Act(
        lambda w: w.cm.load_adapter(w.files["a", 1], "a"), ((0, {**OLD, "a": 1}, None),), step=61
    ),
    "pin": Act(lambda w: w.cm.pin_adapter("a")),
    "merge": Act(lambda w: w.cm.merge("a"), ((0, OLD, "a"),), step=37),
    "unmerge": Act(lambda w: w.cm.unmerge(), ((0, OLD, None),), "a", step=3),
    "push": Act(lambda w: w.cm.load_weights(w.weights(1)), ((1, OLD, None),), step=83),
    "push pairs": Act(lambda w: w.cm.load_weights(w.pairs(1)), ((1, OLD, None),), step=79),
}


@pytest.fixture(scope="module", params=["plain", pytest.param("dora", marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    config = {"use_dora": True} if request.param == "dora" else {}
    return World(tmp_path_factory.mktemp("world"), config)


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ACTS)
def test_interrupted_anywhere(world: World, what: str, thorough: bool) -> None:
    act = ACTS[what]
    states = ((0, OLD, act.merged), *act.after)
    world.reset(act.merged)
    graphs = world.cm.recompiles
    step = max(1, act.step // 20) if thorough else 3 * act.step
    for place, stopped in every_place(lambda: act.run(world), step):
        assert stopped is None or isinstance(stopped, KeyboardInterrupt), (place, stopped)
        if stopped is None:  # inside of a guard Dynamo takes it for one that fails
            graphs = world.cm.recompiles
        if world.cm._session.base.broken:
            # Written in part, and said so: a push keeps no second copy of all weights.
            assert what.startswith("push")
            with pytest.raises(CaptureError, match="load_weights again"):
                elsewhere(world.answer)
        else:
            world.is_one_of(*states)
        world.reset(act.merged)
    assert world.cm.recompiles == graphs
