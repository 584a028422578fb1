"""What Inductor finds out about the machine is found out while a model is traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import Case
from torch._inductor import codecache, cpu_vec_isa

from lorafx.capture import head_start


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which nothing was compiled yet."""
    head_start.wait()
    monkeypatch.setattr(head_start, "_started", None)
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    codecache.CacheBase.get_system.cache_clear()


def known() -> bool:
    caches = (cpu_vec_isa.valid_vec_isa_list, codecache.CacheBase.get_system)
    return all(function.cache_info().currsize for function in caches)


def test_inductor_finds_the_results_where_it_keeps_them(fresh: None) -> None:
    want = [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()], codecache.CacheBase.get_system()
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    codecache.CacheBase.get_system.cache_clear()
    head_start.begin()
    head_start.wait()
    assert known()
    got = [str(isa) for isa in cpu_vec_isa.valid_vec_isa_list()], codecache.CacheBase.get_system()
    assert got == want
    thread = head_start._started
    head_start.begin()
    assert head_start._started is thread


@pytest.mark.parametrize("lowering", ["inductor", "reference"])
def test_it_begins_before_a_model_is_traced(plain: Case, lowering: str, fresh: None) -> None:
    cm: Any = plain.compile({"lowering": lowering})
    assert not known()
    cm.entry(cm.model)
    head_start.wait()
    assert known() == (lowering == "inductor")


def test_what_fails_there_fails_where_inductor_needs_it(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", fails)
    head_start.begin()
    head_start.wait()
    assert codecache.CacheBase.get_system.cache_info().currsize
    with pytest.raises(OSError, match="no compiler"):
        cpu_vec_isa.pick_vec_isa()


def test_no_second_thread_where_the_probe_changes_its_own_flags(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: True, raising=False)
    head_start.begin()
    assert head_start._started is None
