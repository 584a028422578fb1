"""Whatever is done to a compiled model, and in whatever order, every row is its merged model's.

A machine of hypothesis does what users do: adapters of all kinds are loaded, replaced, pinned and
unloaded, merged and exported; base weights are pushed, or written past lorafx; training mode,
gradients, hooks; the model is detached and compiled again. It knows what has to be true, and after
each step a batch of mixed adapters is compared with dense merge.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import oracle
import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, error, save_adapter
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from own_weights import save_own
from torch import Tensor, nn

import lorafx
from lorafx.errors import BatchError, CapacityError, CaptureError, ConfigError, LorafxError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*training mode"),
]
SLOTS, ROWS = 3, 3
NAMES = ("a", "b", "c", "d")
#: Those whose deltas may be part of sums.
LINEAR = ("plain", "wide", "rslora", "ends")
#: Those that depend on the base's own weights.
FOLLOWING = ("dora",)
names = st.sampled_from(NAMES)
numbers = st.integers(0, 1000)
Sum = tuple[tuple[str, float], ...]


def adapters(base: nn.Module, folder: Path) -> dict[str, Path]:
    def saved(name: str, rank: int, targets: Any, **config: Any) -> Path:
        return save_adapter(
            base, folder / name, rank=rank, targets=targets, seed=len(name), **config
        )

    return {
        "plain": saved("plain", 2, ["up"]),
        "wide": saved("wide", 8, "all-linear"),
        "rslora": saved("rslora", 3, ["gate", "down"], use_rslora=True),
        "ends": saved("ends", 4, ["embed", "head"]),
        "dora": saved("dora", 3, ["up", "down"], use_dora=True),
        "biased": saved("biased", 2, ["gate", "head"], lora_bias=True),
        "own": save_own(
            base, folder / "own", seed=3, target_modules=["gate"], modules_to_save=["head"]
        ),
        "too wide": saved("too wide", 9, ["up"]),
    }


class Served(RuleBasedStateMachine):
    case: ClassVar[Case]

    def __init__(self) -> None:
        super().__init__()
        self.base, self.model = copy.deepcopy(self.case.base), self.case.model()
        self.loaded = {"a": "plain", "b": "dora", "c": "own"}
        self.merged: dict[tuple[str, ...] | Sum, nn.Module] = {}
        self.state = torch.random.get_rng_state()
        self.compile()

    def compile(self) -> None:
        config = lorafx.LoraConfig(
            ["embed", "up", "gate", "down", "head"],
            max_adapters=SLOTS,
            max_rank=8,
            use_dora=True,
            lora_bias=True,
            modules_to_save=["head"],
        )
        given = {name: self.case.folders[own] for name, own in self.loaded.items()}
        self.cm: Any = lorafx.compile(self.model, config, adapters=given, options=REFERENCE)
        self.pinned: set[str] = set()
        self.default: str | None = None
        self.in_base: str | None = None
        self.new_tensors = False

    def teardown(self) -> None:
        self.cm.detach()
        torch.random.set_rng_state(self.state)

    # --- the oracle ---

    def alone(self, name: Any) -> nn.Module:
        if name is None:
            return self.base
        parts = name if isinstance(name, dict) else {name: 1.0}
        weights: dict[str, float] = {}
        for own, weight in parts.items():
            weights[self.loaded[own]] = weights.get(self.loaded[own], 0.0) + weight
        key = tuple(sorted(weights.items()))
        if key not in self.merged:
            self.merged[key] = self.sum_of(key)
        return self.merged[key]

    def sum_of(self, weights: Sum) -> nn.Module:
        whole = [oracle.merged(self.base, self.case.folders[own]) for own, _ in weights]
        if len(weights) == 1 and weights[0][1] == 1.0:
            return whole[0]
        made = oracle.untied_copy(self.base)
        with torch.no_grad():
            for name, value in made.named_parameters():
                base = value.clone()
                for (_, weight), other in zip(weights, whole, strict=True):
                    value += weight * (other.get_parameter(name) - base)
        return made

    def check(self, given: list[Any] | None) -> None:
        """A call with these adapters is right, or refused where it has to be."""
        ids = torch.randint(0, 61, (ROWS, 3))
        served = [self.in_base or self.default] * ROWS if given is None else given
        wanted = {str(name) for name in served if name is not None}
        try:
            got = self.cm(ids=ids, adapter_names=given)["logits"]
        except CapacityError:
            assert len(wanted | self.pinned) > SLOTS
            return
        except BatchError:  # what is merged serves nothing else
            assert self.in_base is not None
            assert set(served) != {self.in_base}
            return
        for row, name in enumerate(served):
            want = self.alone(name)(ids=ids[row : row + 1])["logits"]
            assert error(got[row : row + 1], want) <= 3 * TOLERANCE, (served, row)

    @contextlib.contextmanager
    def refused(self, why: bool, kind: type[Exception] = LorafxError) -> Iterator[None]:
        """The block raises exactly where there is a reason, and changes nothing then."""
        seen = self.cm.adapter_versions, self.cm.active_adapter, self.cm.merged
        if not why:
            yield
            return
        with pytest.raises(kind):
            yield
        assert seen == (self.cm.adapter_versions, self.cm.active_adapter, self.cm.merged)

    @invariant()
    def every_row_is_right(self) -> None:
        mixed: list[Any] = [None, *self.loaded][-ROWS:]
        self.check([self.in_base] * ROWS if self.in_base else mixed + [None] * (ROWS - len(mixed)))
        self.check(None)
        assert sorted(self.cm.adapters) == sorted(self.loaded)
        assert self.cm.active_adapter == self.default
        assert self.cm.active_adapters == (() if self.default is None else (self.default,))
        assert self.new_tensors or self.cm.recompiles <= 2  # with adapters, and without

    # --- adapters ---

    @rule(
        name=names,
        kind=st.sampled_from((*LINEAR, *FOLLOWING, "biased", "own", "too wide", "absent")),
    )
    def load(self, name: str, kind: str) -> None:
        in_the_way = self.in_base is not None and (name == self.in_base or kind in FOLLOWING)
        with self.refused(kind not in self.case.folders or kind == "too wide" or in_the_way):
            self.cm.load_adapter(self.case.folders.get(kind, Path("nowhere")), name)
            self.loaded[name] = kind

    @rule(name=names)
    def unload(self, name: str) -> None:
        with self.refused(name not in self.loaded or name == self.in_base):
            self.cm.unload_adapter(name)
            del self.loaded[name]
            self.pinned.discard(name)
            self.default = None if self.default == name else self.default

    @rule(name=names)
    def pin(self, name: str) -> None:
        with self.refused(name not in self.loaded or len(self.pinned | {name}) > SLOTS):
            self.cm.pin_adapter(name)
            self.pinned.add(name)

    @rule(name=names)
    def unpin(self, name: str) -> None:
        with self.refused(name not in self.loaded):
            self.cm.unpin_adapter(name)
            self.pinned.discard(name)

    @rule(name=st.none() | st.just("__base__") | names)
    def choose(self, name: str | None) -> None:
        chosen = None if name == "__base__" else name
        other = self.in_base is not None and chosen != self.in_base
        with self.refused(other or (chosen is not None and chosen not in self.loaded)):
            self.cm.set_adapter(name)
            self.default = chosen

    @rule()
    def disable(self) -> None:
        before = self.default
        with self.refused(self.in_base is not None, ConfigError), self.cm.disable_adapter():
            self.default = None
            self.check(None)
        self.default = before

    @rule(chosen=st.lists(st.integers(-1, 3), min_size=ROWS, max_size=ROWS))
    def call(self, chosen: list[int]) -> None:
        have = list(self.loaded)
        self.check([have[at % len(have)] if have and at >= 0 else None for at in chosen])

    @rule(first=st.integers(0, 3), weights=st.tuples(*[st.sampled_from((-0.7, 0.5, 1.0))] * 2))
    def call_a_sum(self, first: int, weights: tuple[float, float]) -> None:
        have = [name for name, own in self.loaded.items() if own in LINEAR]
        if have and self.in_base is None:
            pair = {have[first % len(have)]: weights[0]}
            pair.setdefault(have[(first + 1) % len(have)], weights[1])
            ranks = {"plain": 2, "wide": 8, "rslora": 3, "ends": 4}
            if sum(ranks[self.loaded[name]] for name in pair) <= 8:
                self.check([pair, None, have[0]])

    # --- base weights ---

    @rule(name=names)
    def merge(self, name: str) -> None:
        other = self.in_base is not None or self.default not in (None, name)
        unfit = self.loaded.get(name) in (None, "own")  # which has a bias of its own
        with self.refused(unfit or other):
            self.cm.merge(name)
            self.in_base = name

    @precondition(lambda self: self.in_base is not None)
    @rule()
    def unmerge(self) -> None:
        self.cm.unmerge()
        self.in_base = None
        self.same_weights()

    def same_weights(self) -> None:
        state = self.model.state_dict()
        assert all(torch.equal(state[key], own) for key, own in self.base.state_dict().items())

    def written(self, seed: int) -> dict[str, Tensor]:
        """New weights, which the oracle has already."""
        generator = torch.Generator().manual_seed(seed)
        state = {
            key: own + 0.1 * torch.randn(own.shape, generator=generator)
            for key, own in self.base.state_dict().items()
        }
        self.base.load_state_dict(state)
        self.merged.clear()
        return state

    @precondition(lambda self: self.in_base is None)
    @rule(seed=numbers, once=st.booleans())
    def push(self, seed: int, once: bool) -> None:
        state = self.written(seed)
        self.cm.load_weights(iter(list(state.items())) if once else state)

    @rule(seed=numbers, once=st.booleans())
    def push_what_does_not_fit(self, seed: int, once: bool) -> None:
        state = {**self.base.state_dict(), "head.weight": torch.zeros(2, 3)}
        with self.refused(True):
            self.cm.load_weights(iter(list(state.items())) if once else state)

    @precondition(lambda self: self.in_base is None and not {*self.loaded.values()} & {*FOLLOWING})
    @rule(seed=numbers, how=st.sampled_from(("load_state_dict", "copy_", "data", "assign")))
    def write_past_lorafx(self, seed: int, how: str) -> None:
        state = self.written(seed)
        if how == "load_state_dict":
            self.cm.load_state_dict(state)
            return
        if how == "assign":
            self.model.load_state_dict(state, assign=True)
            self.new_tensors = True
            return
        for key, parameter in self.model.named_parameters():
            if how == "data":
                parameter.data = state[key].clone()
            else:
                parameter.data.copy_(state[key])

    # --- the module ---

    @rule(mode=st.booleans())
    def train(self, mode: bool) -> None:
        self.cm.train(mode)

    @rule(mode=st.booleans())
    def want_gradients(self, mode: bool) -> None:
        self.cm.requires_grad_(mode)
        self.new_tensors = True  # to Dynamo

    @rule()
    def copies(self) -> None:
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(CaptureError, match="cannot be copied"):
                copied(self.cm)
        ids = torch.randint(0, 61, (2, 3))
        for twin in (copy.deepcopy(self.model), pickle.loads(pickle.dumps(self.model))):
            lorafx.detach(twin)
            want = self.alone(self.in_base)(ids=ids)["logits"]
            assert error(twin(ids=ids)["logits"], want) <= 3 * TOLERANCE

    @rule()
    def detach(self) -> None:
        assert self.cm.detach() is self.model
        self.same_weights()
        assert not any(module._forward_hooks for module in self.model.modules())
        with pytest.raises(CaptureError, match=r"was detached; call lorafx\.compile again"):
            self.cm(ids=torch.zeros(ROWS, 3, dtype=torch.long))
        self.compile()


def run(machine: type[Served], examples: int, steps: int) -> None:
    asked = settings(
        max_examples=examples,
        stateful_step_count=steps,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
    )
    run_state_machine_as_test(machine, settings=asked)


@pytest.mark.parametrize(
    ("examples", "steps"), [(1, 12), pytest.param(100, 60, marks=pytest.mark.slow)]
)
def test_any_order(plain: Case, tmp_path: Path, examples: int, steps: int) -> None:
    case = Case(plain.base, adapters(plain.base, tmp_path))
    run(type("ServedCase", (Served,), {"case": case}), examples, steps)
