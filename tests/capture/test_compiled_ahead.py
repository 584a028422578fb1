"""Kernels that are compiled while a model is traced are those that its graphs ask for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case, check_mixed
from expert_models import moe_case
from tiny_models import FAMILIES
from toolchain import needs_compiler

from lorafx.capture import head_start
from lorafx.kernels.cpu import (
    compilations,
    compile_ahead,
    compiler,
    cpu,
    dense,
    grouped_mm,
    native_ops,
)
from lorafx.kernels.cpu.compile_ahead import Foreseen
from lorafx.kernels.cpu.compiler import PROBE
from lorafx.kernels.cpu.product_source import ProductSpec
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.serving.staged_graphs import staged

pytestmark = pytest.mark.usefixtures("fixed_sizes")
NAMES = ["a1", None, "a3"]
F32 = torch.float32
Asked = dict[Path, list[bool]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Libraries that this process asks for, as one that has loaded none: in the background (False),
    and by a graph (True)."""
    found: Asked = {}
    compile_library = compiler.compile_library

    def noting(source: str, flags: tuple[str, ...] = (), *, wait: bool = True) -> Path:
        path = compile_library(source, flags, wait=wait)
        if not source.startswith(PROBE[:20]):
            found.setdefault(path, []).append(wait)
        return path

    for module in (compiler, compile_ahead, cpu, dense, grouped_mm, native_ops):
        monkeypatch.setattr(module, "compile_library", noting)
    for cache in (cpu.dispatcher, dense.op_library, dense.ready, grouped_mm._built):
        cache.cache_clear()
    monkeypatch.setattr(cpu, "_BUILT", {})
    return found


def served(case: Case, names: Sequence[str | None] = NAMES, **options: object) -> None:
    """A mixed batch through the passes of the Inductor lowering, and the kernels that they name."""
    cm: Any = case.compile({"lowering": "inductor", **options})
    with staged(cm):
        check_mixed(cm, case, names, FAMILIES["llama"].inputs(len(names), 4))
    deadline = time.monotonic() + 60
    while compilations._WORKERS:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def late(asked: Asked) -> list[Path]:
    return [path for path, waited in asked.items() if False not in waited]


def wasted(asked: Asked) -> list[Path]:
    return [path for path, waited in asked.items() if True not in waited]


@needs_compiler
def test_a_llama_asks_for_what_was_foreseen(shallow: Case, asked: Asked) -> None:
    served(shallow)
    assert len(asked) >= 6
    assert late(asked) == wasted(asked) == []


@needs_compiler
def test_so_do_siblings_apart_and_pinned_ones(shallow: Case, asked: Asked) -> None:
    served(shallow, passes={"pack": False}, plan={"model.layers.0.mlp.down_proj": "aten"})
    assert late(asked) == wasted(asked) == []


@needs_compiler
def test_so_do_experts(tmp_path: Path, asked: Asked) -> None:
    served(moe_case("qwen3_moe", tmp_path), ["params", None])
    assert any("ProductSpec" in path.with_suffix(".cpp").read_text() for path in asked)
    assert late(asked) == wasted(asked) == []


@needs_compiler
def test_a_wrong_guess_is_harmless(
    shallow: Case, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [DeltaSpec(F32, F32, F32, 7, 5, 1, size, (0,), (0,), (size,)) for size in (37, 0)]
    wrong = Foreseen(specs, [ProductSpec(F32, 7, 0)], [torch.int64])
    guess: Callable[..., Foreseen] = lambda *arguments: wrong  # noqa: E731
    monkeypatch.setattr(head_start, "before_tracing", guess)
    monkeypatch.setattr(head_start, "in_captured", guess)
    served(shallow)
    assert late(asked)
    assert wasted(asked)


def test_nothing_is_compiled_for_a_model_that_does_not_run(shallow: Case, asked: Asked) -> None:
    shallow.compile({"lowering": "inductor"})
    assert asked == {}
    assert not compilations._WORKERS


def test_nor_where_kernels_are_not_generated(shallow: Case, asked: Asked) -> None:
    cm: Any = shallow.compile()
    cm.entry(cm.model)
    assert asked == {}
    assert not compilations._WORKERS
