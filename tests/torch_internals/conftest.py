"""Other versions than those that are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from lorafx.torch_internals import shortcuts, versions


@pytest.fixture
def unlearnt() -> Iterator[None]:
    """What was found out about what is installed is not known, before and after the test."""
    caches = (versions.check, versions.check_triton, shortcuts._on_by_default)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, unlearnt: None) -> Callable[..., None]:
    """A function that has packages be of other versions; None is not installed."""
    real = versions.installed

    def fake(**found: str | None) -> None:
        monkeypatch.setattr(versions, "installed", lambda name: found.get(name, real(name)))

    return fake
