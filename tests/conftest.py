"""Models with adapters on disk and their oracle, each built once a session."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from dense_merge import Case, build_case

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """The `Case` of a family by name, with changes to its configuration."""
    cases: dict[object, Case] = {}

    def make(family: str, **changes: object) -> Case:
        key = (family, tuple(sorted(changes.items())))
        if key not in cases:
            cases[key] = build_case(family, tmp_path_factory.mktemp(family), **changes)
        return cases[key]

    return make


@pytest.fixture(scope="session")
def llama(case_of: Callable[..., Case]) -> Case:
    return case_of("llama")


@pytest.fixture(scope="session")
def plain(case_of: Callable[..., Case]) -> Case:
    return case_of("plain")


@pytest.fixture(scope="session")
def shallow(case_of: Callable[..., Case]) -> Case:
    """A Llama of one layer, for what needs many graphs."""
    return case_of("llama", num_hidden_layers=1)
