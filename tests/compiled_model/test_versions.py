"""Adapters that are replaced while they are served: each call sees one version of each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, error, save_adapter
from waiting import LONG

import lorafx
from lorafx.errors import UnknownAdapterError

pytestmark = pytest.mark.any_sizes

VERSIONS = 2
CALLS = 10
MOST_CALLS = 200


@pytest.fixture(scope="module")
def folders(plain, tmp_path_factory):
    """Versions of one adapter, each on all linears."""
    root = tmp_path_factory.mktemp("versions")
    return [
        save_adapter(plain.base, root / str(seed), rank=2 + seed, targets="all-linear", seed=seed)
        for seed in range(VERSIONS)
    ]


def compiled(plain: Any, folders: Any) -> Any:
    room = lorafx.LoraConfig(max_adapters=2, max_rank=8)
    adapters = {"x": folders[0], "y": plain.folders["a0"], "z": plain.folders["a1"]}
    options = {**REFERENCE, "overflow": "waves"}
    return lorafx.compile(plain.model(), room, adapters=adapters, options=options)


def test_versions_grow_and_are_told(plain, folders):
    cm = compiled(plain, folders)
    before = cm.adapter_versions
    assert list(before) == ["x", "y", "z"]
    assert len(set(before.values())) == 3
    cm.load_adapter(folders[1], "x")
    after = cm.adapter_versions
    assert after["x"] > max(before.values())
    assert {**after, "x": before["x"]} == before
    cm.unload_adapter("x")
    assert "x" not in cm.adapter_versions


def test_calls_while_adapters_are_replaced(plain, folders):
    """Rows of one call have one version, in all layers, in whatever wave and slot."""
    cm = compiled(plain, folders)
    torch.manual_seed(0)
    names = ["x", "y", None, "z", "x"]
    inputs = {"ids": torch.randint(0, 61, (len(names), 3))}
    first = cm(**inputs, adapter_names=names)["logits"]
    rows = {"x": [0, 4], "y": [1], None: [2], "z": [3]}
    ids = inputs["ids"][rows["x"]]
    wanted = []
    for folder in folders:
        wanted.append(Case(plain.base, {"x": folder}).expected(["x", "x"], {"ids": ids}))
    case = {"y": "a0", "z": "a1", None: None}
    others = {n: plain.expected([case[n]], {"ids": inputs["ids"][rows[n]]}) for n in case}
    assert error(first[rows["x"]], wanted[0]) <= TOLERANCE < error(wanted[0], wanted[1])
    done, failures, seen = threading.Event(), list[BaseException](), set[int]()
    missing: list[str] = []

    def until_done(action: Callable[[int], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                number = 0
                while not done.is_set():
                    action(number)
                    number += 1
            except BaseException as failure:
                failures.append(failure)
                done.set()

        return run

    def replace(number: int) -> None:
        cm.load_adapter(folders[number % VERSIONS], "x")

    def come_and_go(number: int) -> None:
        cm.unload_adapter("z")
        cm.load_adapter(plain.folders["a1"], "z")

    def call() -> None:
        try:
            for number in range(MOST_CALLS):
                if number >= CALLS and seen == {0, 1}:
                    return
                time.sleep(0.005)  # writers wait for the lock
                try:
                    got = cm(**inputs, adapter_names=names)["logits"]
                except UnknownAdapterError as gone:
                    missing.append(str(gone))
                    continue
                for name, want in others.items():
                    assert error(got[rows[name]], want) <= TOLERANCE
                fits = [error(got[rows["x"]], want) <= TOLERANCE for want in wanted]
                assert sum(fits) == 1
                seen.add(fits.index(True))
        except BaseException as failure:
            failures.append(failure)

    callers = [threading.Thread(target=call) for _ in range(2)]
    writers = [threading.Thread(target=until_done(act)) for act in (replace, come_and_go)]
    recompiles = cm.recompiles
    for thread in (*callers, *writers):
        thread.start()
    for thread in callers:
        thread.join(LONG)
    done.set()
    for thread in writers:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in (*callers, *writers))
    assert not failures, failures
    assert all("'z'" in each for each in missing)
    assert seen == {0, 1}
    assert cm.recompiles <= recompiles + 1  # a wave of one row, if z was gone
