"""attend on graphs built by hand: attention to a paged cache becomes one operator."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compile_only_gpu import on_cuda
from dense_merge import error
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Finished, Holder, SiteGraph
from toolchain import needs_compiler
from torch import fx, nn

from lorafx.kernels.ops.paged_attention import PAGED_CACHE
from lorafx.passes.attend import Attend

pytestmark = [pytest.mark.quick, needs_compiler]

aten = torch.ops.aten
TOKENS, COUNT, HEADS, SIZE = 3, 7, 2, 4
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
#: What torch makes of it on GPUs, with a mask.
GPU_ATTENTION = (
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)

Change = Callable[[SiteGraph, fx.Node], fx.Node]


def built(
    group: int = 1,
    mask: Change = lambda g, mask: mask,
    keys: Change = lambda g, keys: keys,
    also: Callable[[SiteGraph, fx.Node, fx.Node], list[fx.Node]] = lambda g, keys, pages: [],
    causal: bool = False,
    kernel: Any = _ATTENTION,
    size: int = SIZE,
) -> Finished:
    """Two requests: one token that sees four rows, and two that see three. `mask`, `keys` change
    what attention takes; `also` is what else is computed of the keys and the cache."""
    torch.manual_seed(0)
    g = SiteGraph(Holder(w=nn.Linear(4, 4)), [0, 0, 0])
    hidden = torch.zeros(1, 1, TOKENS, COUNT)
    hidden[0, 0, 0, 4:] = hidden[0, 0, 1:, :4] = hidden[0, 0, 1, 6] = torch.finfo(torch.float32).min
    queries = torch.randn(1, HEADS * group, TOKENS, size)
    values: list[Any] = [
        queries.transpose(1, 2).contiguous().transpose(1, 2),
        *torch.randn(2, 1, HEADS, TOKENS, size).unbind(),
        torch.randn(32 * HEADS * size).view(torch.uint8),
        torch.tensor([1, 2, 3, 4, 9, 10, 11]),
        torch.tensor([4, 10, 11]),
        torch.tensor([[0, 4], [4, 7], [4, 7]]),
        hidden,
    ]
    q, k, v, pages, read, write, seen, m = (g.argument(value) for value in values)
    cached = g.call(PAGED_CACHE, k, v, pages, read, write, 0, 16, -1, False, seen, m)
    found = [g.call(operator.getitem, cached, place) for place in (0, 1)]
    others = also(g, found[0], pages)
    if group > 1:
        for place, part in enumerate(found):
            part = g.call(aten.unsqueeze.default, part, 2)
            part = g.call(aten.expand.default, part, [1, HEADS, group, COUNT, size])
            part = g.call(aten.clone.default, part, memory_format=torch.contiguous_format)
            found[place] = g.call(aten.view.default, part, [1, HEADS * group, COUNT, size])
    asked, hides = (q, keys(g, found[0]), found[1]), mask(g, m)
    if kernel is _ATTENTION:
        both = g.call(kernel, *asked, 0.0, causal, attn_mask=hides, scale=0.4)
    else:
        both = g.call(kernel, *asked, hides, False, 0.0, causal, scale=0.4)
    done = g.output(g.call(operator.getitem, both, 0), *others)
    if kernel is not _ATTENTION:
        on_cuda(g.mode, done.gm)
    return done


def test_the_graph_before_and_after() -> None:
    done = built()
    want = done.result()[0]
    assert_expected_inline(
        shown(done, Attend()),
        """\
paged_cache = lorafx.paged_cache(x_1, x_2, x_3, x_4, x_5, 0, 16, -1, False, x_6, x_7)
getitem = getitem(paged_cache, 0)
getitem_1 = getitem(paged_cache, 1)
_scaled_dot_product_flash_attention_for_cpu =
    aten._scaled_dot_product_flash_attention_for_cpu(x, getitem, getitem_1, 0.0, False,
    attn_mask=x_7, scale=0.4)
getitem_2 = getitem(_scaled_dot_product_flash_attention_for_cpu, 0)
return getitem_2

attend: 1 edit

paged_attention = lorafx.paged_attention(x, x_1, x_2, x_3, x_4, x_5, x_6, x_7, 0, 16, -1,
    False, 0.4)
return paged_attention
""",
    )
    assert error(done.result()[0], want) <= 1e-6


def test_heads_that_are_repeated() -> None:
    done = built(group=3)
    want = done.result()[0]
    assert done.run(Attend()) == 1
    assert len(done.targets()) == 1
    assert error(done.result()[0], want) <= 1e-6


def added(g: SiteGraph, node: fx.Node) -> fx.Node:
    return g.call(aten.add.Tensor, node, 1.0)


def aligned(g: SiteGraph, mask: fx.Node) -> fx.Node:
    """As torch has masks of odd lengths lie for its own kernels."""
    mask = g.call(aten.constant_pad_nd.default, mask, [0, 1], 0.0)
    mask = g.call(aten.slice.Tensor, mask, -1, 0, COUNT)
    return g.call(aten.expand.default, mask, [1, HEADS, TOKENS, COUNT])


@pytest.mark.parametrize("mask", [aligned, lambda g, mask: mask], ids=["aligned", "as it is"])
@pytest.mark.parametrize("kernel", GPU_ATTENTION, ids=lambda kernel: kernel.name())
def test_on_a_gpu(kernel: Any, mask: Change) -> None:
    """The values of the graph are on a GPU; the numbers are those of the operator on a CPU."""
    done = built(kernel=kernel, mask=mask)
    assert done.run(Attend()) == 1
    assert done.targets() == ["paged_attention.default"]
    assert error(done.result()[0], built().result()[0]) <= 1e-6


def cut(g: SiteGraph, mask: fx.Node) -> fx.Node:
    """Another mask: what hides the first key from a token hides the second from it."""
    mask = g.call(aten.constant_pad_nd.default, mask, [1, 0], 0.0)
    return g.call(aten.slice.Tensor, mask, -1, 0, COUNT)


ON_A_GPU = [{"mask": change} for change in (added, cut, lambda g, mask: None)]
ON_A_GPU += [{"causal": True}, {"size": 300}]  # the last has no kernel


@pytest.mark.parametrize(
    "changes",
    [
        *({"mask": added}, {"mask": lambda g, mask: None}, {"keys": added}, {"causal": True}),
        {"also": lambda g, keys, pages: [added(g, keys)]},
        {"also": lambda g, keys, pages: [g.call(aten.sum.default, pages)]},
        *({"kernel": GPU_ATTENTION[0], **changes} for changes in ON_A_GPU),
    ],
)
def test_anything_else_is_left_as_it_is(changes: Any) -> None:
    done = built(**changes)
    before = done.targets()
    assert done.run(Attend()) == 0
    assert done.targets() == before
