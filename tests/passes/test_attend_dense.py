"""attend_dense on graphs built by hand: attention reads each head of keys once."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_merge import error
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Finished, Holder, SiteGraph
from toolchain import needs_compiler
from torch import fx, nn

from lorafx.passes import attend_dense
from lorafx.passes.attend_dense import AttendDense

pytestmark = [pytest.mark.quick, needs_compiler]

aten = torch.ops.aten
B, HEADS, GROUP, T, N, D = 2, 2, 3, 4, 7, 8
Change = Callable[[SiteGraph, fx.Node], fx.Node]


def as_it_is(_: SiteGraph, node: fx.Node) -> fx.Node:
    return node


def repeated(g: SiteGraph, part: fx.Node) -> fx.Node:
    """As transformers repeats heads of keys for the queries of a group."""
    part = g.call(aten.unsqueeze.default, part, 2)
    part = g.call(aten.slice.Tensor, part, 3, 0, 2**63 - 1)
    part = g.call(aten.expand.default, part, [B, HEADS, GROUP, N, D])
    part = g.call(aten.clone.default, part, memory_format=torch.contiguous_format)
    return g.call(aten.view.default, part, [B, HEADS * GROUP, N, D])


def tiled(g: SiteGraph, part: fx.Node) -> fx.Node:
    """All heads, and then all of them again: queries of a group are not adjacent."""
    part = g.call(aten.unsqueeze.default, part, 1)
    part = g.call(aten.expand.default, part, [B, GROUP, HEADS, N, D])
    part = g.call(aten.clone.default, part, memory_format=torch.contiguous_format)
    return g.call(aten.view.default, part, [B, HEADS * GROUP, N, D])


def built(
    keys: Change = repeated,
    values: Change = repeated,
    mask: Any = (B, 1, T, N),
    causal: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    transposed: bool = True,
    also: bool = False,
    lowering: str = "inductor",
) -> Finished:
    torch.manual_seed(0)
    g = SiteGraph(Holder(w=nn.Linear(4, 4)), [0, 0], lowering=lowering)
    queries = torch.randn(B, HEADS * GROUP, T, D)
    if transposed:
        queries = queries.transpose(1, 2).contiguous().transpose(1, 2)
    q, k, v = (
        g.argument(part.to(dtype)) for part in (queries, *torch.randn(2, B, HEADS, N, D).unbind())
    )
    hides = None if mask is None else g.argument(torch.randn(mask).to(dtype))
    both = g.call(
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        *(q, keys(g, k), values(g, v), dropout, causal),
        attn_mask=hides,
    )
    statistics = [g.call(operator.getitem, both, 1)] if also else []
    return g.output(g.call(operator.getitem, both, 0), *statistics)


def test_the_graph_before_and_after() -> None:
    done = built()
    want = done.result()[0]
    assert_expected_inline(
        shown(done, AttendDense()),
        """\
unsqueeze = aten.unsqueeze(x_1, 2)
slice = aten.slice.Tensor(unsqueeze, 3, 0, 9223372036854775807)
expand = aten.expand(slice, [2, 2, 3, 7, 8])
clone = aten.clone(expand, memory_format=torch.contiguous_format)
view = aten.view(clone, [2, 6, 7, 8])
unsqueeze_1 = aten.unsqueeze(x_2, 2)
slice_1 = aten.slice.Tensor(unsqueeze_1, 3, 0, 9223372036854775807)
expand_1 = aten.expand(slice_1, [2, 2, 3, 7, 8])
clone_1 = aten.clone(expand_1, memory_format=torch.contiguous_format)
view_1 = aten.view(clone_1, [2, 6, 7, 8])
_scaled_dot_product_flash_attention_for_cpu =
    aten._scaled_dot_product_flash_attention_for_cpu(x, view, view_1, 0.0, False,
    attn_mask=x_3)
getitem = getitem(_scaled_dot_product_flash_attention_for_cpu, 0)
return getitem

attend_dense: 1 edit

attention = lorafx.attention(x, x_1, x_2, [x_3], False, 0.3535533905932738)
return attention
""",
    )
    assert error(done.result()[0], want) <= 1e-6


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("mask", [None, (1, 1, 1, N), (B, 1, T, N)], ids=str)
def test_masks_and_strides(mask: Any, transposed: bool) -> None:
    done = built(mask=mask, causal=mask is None, transposed=transposed)
    want = done.result()[0]
    assert done.run(AttendDense()) == 1
    got = done.result()[0]
    assert error(got, want) <= 1e-6
    assert got.stride() == want.stride()


def test_heads_repeated_in_another_order() -> None:
    """They are read as they are: only the keys' copies of each head that lie together are one."""
    done = built(keys=tiled)
    want = done.result()[0]
    assert done.run(AttendDense()) == 1
    assert "clone.default" in done.targets()
    assert error(done.result()[0], want) <= 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"lowering": "reference"},
        {"also": True},
        {"dropout": 0.5},
        {"dtype": torch.float64},
        {"mask": (1, 1, T, 1)},
        {"mask": (1, HEADS * GROUP, T, N)},  # the queries of a group would share one
    ],
    ids=str,
)
def test_anything_else_is_left_as_it_is(changes: Any) -> None:
    done = built(**changes)
    before = done.targets()
    assert done.run(AttendDense()) == 0
    assert done.targets() == before


def test_matrix_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies many queries in bfloat16 by them."""
    monkeypatch.setattr(attend_dense, "has_matrix_tiles", lambda: True)
    assert built(dtype=torch.bfloat16).run(AttendDense()) == 0
    assert built().run(AttendDense()) == 1
