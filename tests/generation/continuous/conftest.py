"""A Llama of one layer with eight adapters, and compiled models of it that tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dense_merge import REFERENCE, Case, build_case, save_adapter
from tiny_models import Family

import lorafx


def eight(family: str | Family, folder: Path, **changes: Any) -> Case:
    """A case with adapters a0 to a7."""
    case = build_case(family, folder, **changes)
    for seed in range(5, 8):
        name = f"a{seed}"
        case.folders[name] = save_adapter(
            case.base, folder / name, rank=1 + seed % 4, targets="all-linear", seed=seed
        )
    return case


@pytest.fixture(scope="session")
def eight_of() -> Callable[..., Case]:
    return eight


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One layer, eight adapters."""
    return eight("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def _made() -> dict[tuple[int | None, str], Any]:
    """Slots and how calls start -> the compiled model."""
    return {}


@pytest.fixture
def with_slots(
    llama: Case, _made: dict[tuple[int | None, str], Any]
) -> Iterator[Callable[[int | None], Any]]:
    """`llama` compiled with so many slots, None for one an adapter: each once. After the test it
    has its own adapters and weights again, none of them pinned."""
    used: list[Any] = []

    def of(slots: int | None) -> Any:
        key = slots, os.environ["LORAFX_START"]  # which `in_eager_mode` changes
        if key not in _made:
            config = slots and lorafx.LoraConfig(max_adapters=slots, max_rank=8)
            _made[key] = lorafx.compile(
                llama.model(), config, adapters=llama.folders, options=REFERENCE
            )
        used.append(_made[key])
        return _made[key]

    yield of
    for cm in used:
        cm.set_adapter(None)
        for name in cm._session.store.pinned:
            cm.unpin_adapter(name)
        for name in set(cm.adapters) - set(llama.folders):
            cm.unload_adapter(name)
        for name, folder in llama.folders.items():
            cm.load_adapter(folder, name)


@pytest.fixture
def cm(with_slots: Callable[[int | None], Any]) -> Any:
    return with_slots(None)
