"""Inductor spares itself work for logs, and comparisons of equal layouts: its code is the same."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_merge import Case, build_case
from torch._dynamo.repro import after_aot
from torch._inductor import codecache, fx_utils
from torch._inductor import ir as inductor_ir
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lorafx.capture import lowering
from lorafx.capture.inductor_shortcuts import shortcuts

IDS = torch.tensor([[7, 40, 12], [9, 9, 31], [60, 5, 17]])


class Enough(Exception):
    """Inductor has written its code, which nobody compiles here."""


def code_of(case: Case, monkeypatch: pytest.MonkeyPatch, *, dynamic: bool) -> str:
    """What Inductor writes for a prompt into a cache of a fixed size."""
    found: list[str] = []

    def keep(code: str) -> None:
        found.append(code)
        raise Enough

    monkeypatch.setattr(GraphLowering, "save_output_code", keep)
    cm: Any = case.compile(options={"lowering": "inductor"}, dynamic=dynamic)
    past = transformers.StaticCache(config=cm.model.config, max_cache_len=8)
    with pytest.raises(Exception, match="Enough"):
        cm(input_ids=IDS, past_key_values=past, adapter_names=["a0", None, "a1"])
    # Comments and the names of kernels say what else the process has traced.
    code = re.sub(r"#.*|cpp_fused_\w+", "", found[0])
    # So do the names of sizes; here each is called by where it stands first.
    names: dict[str, str] = {}
    return re.sub(r"\bs\d+\b", lambda size: names.setdefault(size[0], f"size_{len(names)}"), code)


def noting(name: str, of: Callable[..., Any], asked: list[str]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        asked.append(name)
        return of(*args, **kwargs)

    return called


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_code_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dynamic: bool
) -> None:
    case = build_case("llama", tmp_path, num_hidden_layers=3)
    asked: list[str] = []
    asked_by = {
        "debug_lines": codecache.FxGraphCachePickler,
        "save_graph_repro": after_aot,
        "require_exact_strides": inductor_ir.ExternKernel,
        "significant_strides_equal": inductor_ir,
        "is_non_overlapping_and_dense_or_false": torch._prims_common,
    }
    for name, owner in asked_by.items():
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name), asked))
    with monkeypatch.context() as without:
        without.setattr(lowering, "shortcuts", nullcontext)
        torch._dynamo.reset()
        plain = code_of(case, without, dynamic=dynamic)
    before = {name: asked.count(name) for name in asked}
    assert before.keys() == asked_by.keys()
    asked.clear()
    torch._dynamo.reset()
    assert code_of(case, monkeypatch, dynamic=dynamic) == plain
    assert "outlined_0" in plain
    # What stays are views, what may be laid out in another way, and the first of each layout.
    rest = {"require_exact_strides", "is_non_overlapping_and_dense_or_false"}
    assert set(asked) <= rest
    assert all(asked.count(name) < before[name] * 2 / 3 for name in rest)


@pytest.mark.parametrize("keeper", ["debug", "trace"])
def test_logs_that_are_kept_are_whole(monkeypatch: pytest.MonkeyPatch, keeper: str) -> None:
    lines = codecache.FxGraphCachePickler.debug_lines
    script = after_aot.save_graph_repro
    if keeper == "trace":
        monkeypatch.setenv("TORCH_TRACE", "/nowhere")
    else:
        level = codecache.log.level
        codecache.log.setLevel(logging.DEBUG)
        monkeypatch.setattr(codecache.log, "level", logging.DEBUG)
        assert codecache.log.isEnabledFor(logging.DEBUG)
    try:
        with shortcuts():
            assert codecache.FxGraphCachePickler.debug_lines is lines
            assert (after_aot.save_graph_repro is script) == (keeper == "trace")
    finally:
        if keeper == "debug":
            codecache.log.setLevel(level)
    assert after_aot.save_graph_repro is script


@pytest.mark.skipif(
    not hasattr(fx_utils, "_is_fake_tensor_same"), reason="torch before 2.13 has no such function"
)
def test_layouts_are_compared_as_inductor_compares_them() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        one = torch.ones(2, 3)
        others = [torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(2, 4), torch.ones(2, 3, 1)]
        others += [torch.ones(2, 3, device="meta"), one.view(6)]
    same = fx_utils._is_fake_tensor_same
    known = [same(one, other, {}, check_storage=False) for other in others]
    assert known == [True, False, False, False, False, False]
    with shortcuts():
        assert [
            fx_utils._is_fake_tensor_same(one, other, {}, check_storage=False) for other in others
        ] == known
        assert not fx_utils._is_fake_tensor_same(one, others[0], {1: 1})  # other memory
        assert fx_utils._is_fake_tensor_same([one, None], [one, None], {})
    assert fx_utils._is_fake_tensor_same is same


@pytest.mark.skipif(not hasattr(fx_utils, "sym_eq"), reason="torch has no such function there")
def test_sizes_are_seen_to_be_equal_without_a_solver() -> None:
    env = ShapeEnv()
    size, other = (env.create_unbacked_symint() for _ in range(2))
    with shortcuts():
        assert fx_utils.sym_eq((size, 3), (size, 3)) is True
        assert fx_utils.sym_eq((2, 3), (2, 4)) is False
        assert fx_utils.sym_eq((2, 3), (2, 3, 1)) is False
        assert not fx_utils.statically_known_true(fx_utils.sym_eq((size, 3), (other, 3)))
