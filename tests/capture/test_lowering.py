"""Graphs with adapters under Inductor: deltas stay where they are in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import Case, check_mixed
from tiny_models import FAMILIES
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import memory

from lorafx.capture.lowering import InductorLowering, lowering_for
from lorafx.config import Options
from lorafx.errors import ConfigError
from lorafx.torch_internals.inductor import code_noted

NAMES = ["a1", None, "a3"]


def test_no_order_by_memory_for_graphs_with_adapters(
    plain: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That order may put a delta, which is added in place, behind what reads the sum."""
    ordered: list[int] = []
    order = memory.reorder_for_peak_memory

    def noting(nodes: list[Any], *rest: Any) -> list[Any]:
        ordered.append(len(nodes))
        return order(nodes, *rest)

    monkeypatch.setattr(memory, "reorder_for_peak_memory", noting)
    torch.manual_seed(0)
    inputs = FAMILIES["plain"].inputs(len(NAMES), 4)
    cm = plain.compile(options={"lowering": "inductor", "base_graphs": True})
    with torch._inductor.config.patch(fx_graph_cache=False):
        cm(**inputs)
        assert ordered, "the base is compiled as Inductor would"
        ordered.clear()
        check_mixed(cm, plain, NAMES, inputs)
    assert not ordered


def test_a_mode_of_torch_compile_stands_for_settings_of_inductor() -> None:
    options = Options(lowering="inductor", mode="max-autotune")
    lowering = lowering_for(options, {"max_autotune_pointwise": False})
    assert isinstance(lowering, InductorLowering)
    wanted = dict(torch._inductor.list_mode_options("max-autotune"))
    assert wanted["max_autotune"]
    assert lowering.patches == {**wanted, "max_autotune_pointwise": False}
    assert lowering_for(Options(lowering="inductor")).patches == {}
    with pytest.raises(ConfigError, match=r"Options\.mode must be one of None, default, reduce"):
        Options(mode="fast")


@torch.library.custom_op("lorafx_test_layouts::turned", mutates_args=())
def turned(x: torch.Tensor) -> torch.Tensor:
    return x.t().clone()  # clone keeps the strides


@turned.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[1], x.shape[0])


def lowered_by(lowering: Any, function: Any) -> tuple[Any, str]:
    code: list[str] = []
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=lowering.compile))
    with (
        code_noted(code.append),
        torch.no_grad(),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        return compiled(torch.ones(2, 3)), "".join(code)


def test_sizes_are_compared_where_they_are_asked_for() -> None:
    plain = lowering_for(Options(lowering="inductor"))
    assert "assert_size_stride(" not in lowered_by(plain, lambda x: x.cumsum(0) + 1)[1]
    numeric = lowering_for(Options(lowering="inductor", verify="numeric"))
    assert "assert_size_stride(" in lowered_by(numeric, lambda x: x.cumsum(0) + 1)[1]


def test_sizes_are_compared_where_an_operator_of_others_says_what_they_are() -> None:
    """The fake is wrong: without a comparison, strides that are not there would be read."""
    plain = lowering_for(Options(lowering="inductor"))
    with pytest.raises(AssertionError, match="turned"):
        lowered_by(plain, lambda x: turned(x) + 1)
