"""products and join on graphs built by hand, and in models whose batches grow and shrink."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from dense_merge import check_mixed, error
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Finished, Holder, SiteGraph
from tiny_models import FAMILIES
from toolchain import needs_compiler
from torch import fx, nn

from lorafx.kernels.cpu.weight_mm import MAX_ROWS, many_in_float32, op_library
from lorafx.passes.fuse import Fuse
from lorafx.passes.lower import Lower
from lorafx.passes.match import Match
from lorafx.passes.plan import Plan
from lorafx.passes.products import Join, Products

pytestmark = [pytest.mark.any_sizes, needs_compiler]

aten = torch.ops.aten
K, N = 4, 6


def start(rows: int = 3, dtype: torch.dtype = torch.float32) -> tuple[SiteGraph, fx.Node]:
    torch.manual_seed(0)
    modules = Holder(up=nn.Linear(K, N), packed=nn.Linear(K, 2 * N))
    g = SiteGraph(modules.to(dtype), [0, -1, 2], lowering="inductor")
    return g, g.argument(torch.randn(rows, K).to(dtype))


def transposed(g: SiteGraph, weight: fx.Node) -> fx.Node:
    return g.call(aten.permute.default, weight, [1, 0])


def parts(g: SiteGraph, x: fx.Node, cuts: list[int], *, bias: bool) -> list[fx.Node]:
    """Products of x with rows [cuts[i], cuts[i + 1]) of the packed weight."""
    found = []
    for begin, end in pairwise(cuts):
        weight = g.call(aten.slice.Tensor, g.weight("packed"), 0, begin, end)
        if bias:
            own = g.call(aten.slice.Tensor, g.weight("packed", "bias"), 0, begin, end)
            found.append(g.call(aten.addmm.default, own, x, transposed(g, weight)))
        else:
            found.append(g.call(aten.mm.default, x, transposed(g, weight)))
    return found


def check(done: Finished, edits: int, ops: list[str]) -> None:
    want = done.result()
    assert done.run(Products()) == edits
    found = [name.partition(".")[0] for name in done.targets()]
    assert [name for name in found if "mm" in name] == ops
    for got, expected in zip(done.result(), want, strict=True):
        assert error(got, expected) <= 1e-6


def test_the_graph_before_and_after() -> None:
    g, x = start()
    up = g.call(aten.addmm.default, g.weight("up", "bias"), x, transposed(g, g.weight("up")))
    both = g.call(aten.cat.default, parts(g, x, [0, 5, 2 * N], bias=False), 1)
    assert_expected_inline(
        shown(g.output(up, both), Products()),
        """\
permute = aten.permute(up_weight, [1, 0])
addmm = aten.addmm(up_bias, x, permute)
slice = aten.slice.Tensor(packed_weight, 0, 0, 5)
permute_1 = aten.permute(slice, [1, 0])
mm = aten.mm(x, permute_1)
slice_1 = aten.slice.Tensor(packed_weight, 0, 5, 12)
permute_2 = aten.permute(slice_1, [1, 0])
mm_1 = aten.mm(x, permute_2)
cat = aten.cat([mm, mm_1], 1)
return addmm, cat

products: 2 edits

weight_mm = lorafx.weight_mm(x, up_weight, up_bias)
weight_mm_1 = lorafx.weight_mm(x, packed_weight, None, [5, 7])
return weight_mm, weight_mm_1
""",
    )


def test_parts_in_another_order_and_of_another_x() -> None:
    g, x = start()
    first, second = parts(g, x, [0, 5, 2 * N], bias=False)
    turned = g.call(aten.cat.default, [second, first], 1)
    other = parts(g, g.call(aten.relu.default, x), [0, 5, 2 * N], bias=False)[1]
    mixed = g.call(aten.cat.default, [first, other], 1)
    check(g.output(turned, mixed), 3, ["weight_mm"] * 3)


def many(g: SiteGraph, x: fx.Node) -> fx.Node:
    return g.call(aten.mm.default, x, transposed(g, g.weight("up")))


def scaled(g: SiteGraph, x: fx.Node) -> fx.Node:
    right = transposed(g, g.weight("up"))
    node = g.call(aten.addmm.default, g.weight("up", "bias"), x, right)
    node.kwargs = {"alpha": 2}
    return node


@pytest.mark.parametrize(
    ("build", "rows", "dtype", "edits"),
    [
        (many, MAX_ROWS, torch.float32, 1),
        (many, MAX_ROWS + 1, torch.bfloat16, 0),  # which is oneDNN's anyway
        (many, MAX_ROWS + 1, torch.float16, 1),
        (many, 3, torch.float64, 0),
        (scaled, 3, torch.float32, 0),
    ],
)
def test_what_is_left_alone(build, rows: int, dtype: torch.dtype, edits: int) -> None:
    """On a CPU with instructions for bfloat16, and none for float16."""
    g, x = start(rows, dtype)
    done = g.output(build(g, x))
    want, library = done.result(), op_library()
    many_in_float32(library, torch.bfloat16, False)
    many_in_float32(library, torch.float16, True)
    try:
        assert done.run(Products()) == edits
        assert error(done.result()[0], want[0]) <= (1e-3 if dtype == torch.float16 else 1e-6)
    finally:
        many_in_float32(library, torch.bfloat16)
        many_in_float32(library, torch.float16)


B, T = 3, 2
FIRST = (Match(), Fuse(), Plan(), Lower())


def marked(path: str, x: torch.Tensor) -> tuple[SiteGraph, fx.Node, fx.Node]:
    """(graph, x, what the linear gives)"""
    torch.manual_seed(0)
    modules = Holder(with_bias=nn.Linear(K, N), without=nn.Linear(K, N, bias=False))
    targets = ["with_bias", "without"]
    g = SiteGraph(modules, [0, -1, 2], lowering="inductor", targets=targets)
    node = g.argument(x)
    bias = path == "with_bias"
    g.declare(path, bias=bias)
    own = [g.weight(path, "bias")] if bias else []
    return g, node, g.call(aten.linear.default, node, g.weight(path), *own)


@pytest.mark.parametrize("path", ["with_bias", "without"])
def test_a_product_and_its_delta(path: str) -> None:
    torch.manual_seed(2)
    x = torch.randn(B, T, K)
    g, node, y = marked(path, x)
    done = g.output(g.mark(path, node, y, rows=T))
    want = g.merged(path, x)
    done.run(*FIRST, Products())
    assert done.run(Join()) == 1
    names = [name.partition(".")[0] for name in done.targets()]
    assert [name for name in names if "mm" in name or "auto" in name] == ["weight_mm_delta"]
    assert error(done.result()[0], want) <= 1e-5
    (states,) = done.ctx.states.values()
    assert [state.site.path for state in states] == [path]


def test_a_product_that_somebody_else_reads() -> None:
    x = torch.randn(B, T, K)
    g, node, y = marked("without", x)
    done = g.output(g.mark("without", node, y, rows=T), y)
    want = done.result()
    done.run(*FIRST, Products())
    assert done.run(Join()) == 0
    for got, expected in zip(done.result(), want, strict=True):
        assert error(got, expected) <= 1e-5


@pytest.mark.slow
def test_a_batch_that_grows_and_shrinks(plain) -> None:
    """One graph for few rows and many, with rows of the base, and the bits of two ops."""
    torch.manual_seed(0)
    together, apart = (
        plain.compile(options={"lowering": "inductor", "passes": {"join": joined}})
        for joined in (True, False)
    )
    family = FAMILIES["plain"]
    check_mixed(together, plain, ["a0", None, "a1"], family.inputs(3, 5))
    compiled = together.recompiles
    for rows, length in ((2, 3), (9, 7), (16, 9), (4, 16)):  # 6 to 144 rows
        names = [(None, "a0", "a1")[row % 3] for row in range(rows)]
        inputs = family.inputs(rows, length)
        check_mixed(together, plain, names, inputs)
        got, want = (cm(**inputs, adapter_names=names)["logits"] for cm in (together, apart))
        assert torch.equal(got, want)
    assert together.recompiles == compiled
    passes = {report.name: report.edits for report in together._session.backend.records[0].passes}
    assert passes["products"] > 0
    assert passes["join"] > 0
    reports = apart._session.backend.records[0].passes
    assert not any(report.name == "join" for report in reports)


Q = 64  # columns of integers, in two groups


def integers(g: SiteGraph, groups: int) -> tuple[fx.Node, fx.Node, fx.Node]:
    q = torch.randint(-128, 128, (N, Q), dtype=torch.int8)
    zero = torch.randint(-9, 9, (N, groups), dtype=torch.int8)
    return g.argument(q), g.argument(torch.rand(N, groups)), g.argument(zero)


def cast(g: SiteGraph, node: fx.Node, dtype: torch.dtype = torch.float32) -> fx.Node:
    return g.call(torch.ops.prims.convert_element_type.default, node, dtype)


def test_integers_that_are_scaled_before_and_after_the_product() -> None:
    torch.manual_seed(0)
    g, _ = start()
    x, bias = g.argument(torch.randn(3, Q)), g.argument(torch.randn(N))
    q, scale, zero = integers(g, 2)
    blocks = [g.call(aten.view.default, t, [N, 2, size]) for t, size in ((q, 32), (zero, 1))]
    moved = g.call(aten.sub.Tensor, *(cast(g, t) for t in blocks))
    W = g.call(aten.mul.Tensor, moved, g.call(aten.view.default, scale, [N, 2, 1]))
    W = transposed(g, g.call(aten.view.default, W, [N, Q]))
    before = g.call(aten.addmm.default, bias, x, W)
    q, scale, _ = integers(g, 1)
    y = g.call(aten.mm.default, x, cast(g, transposed(g, q)))
    y = g.call(aten.mul.Tensor, y, g.call(aten.view.default, scale, [N]))
    after = g.call(aten.add.Tensor, g.call(aten.view.default, y, [3, 1, N]), bias)
    assert_expected_inline(
        shown(g.output(before, after), Products()),
        """\
view = aten.view(x_3, [6, 2, 32])
view_1 = aten.view(x_5, [6, 2, 1])
convert_element_type = prims.convert_element_type(view, torch.float32)
convert_element_type_1 = prims.convert_element_type(view_1, torch.float32)
sub = aten.sub.Tensor(convert_element_type, convert_element_type_1)
view_2 = aten.view(x_4, [6, 2, 1])
mul = aten.mul.Tensor(sub, view_2)
view_3 = aten.view(mul, [6, 64])
permute = aten.permute(view_3, [1, 0])
addmm = aten.addmm(x_2, x_1, permute)
permute_1 = aten.permute(x_6, [1, 0])
convert_element_type_2 = prims.convert_element_type(permute_1, torch.float32)
mm = aten.mm(x_1, convert_element_type_2)
view_4 = aten.view(x_7, [6])
mul_1 = aten.mul.Tensor(mm, view_4)
view_5 = aten.view(mul_1, [3, 1, 6])
add = aten.add.Tensor(view_5, x_2)
return addmm, add

products: 2 edits

weight_mm = lorafx.weight_mm(x_1, x_3, x_2, None, x_4, x_5)
weight_mm_1 = lorafx.weight_mm(x_1, x_6, x_2, None, x_7)
view = aten.view(weight_mm_1, [3, 1, 6])
return weight_mm, view
""",
    )


def ungrouped(g: SiteGraph, q: fx.Node, scale: fx.Node, zero: fx.Node) -> fx.Node:
    return g.call(aten.mul.Tensor, cast(g, q), scale)


def twice(g: SiteGraph, q: fx.Node, scale: fx.Node, zero: fx.Node) -> fx.Node:
    return g.call(aten.mul.Tensor, ungrouped(g, q, scale, zero), scale)


def zero_last(g: SiteGraph, q: fx.Node, scale: fx.Node, zero: fx.Node) -> fx.Node:
    return g.call(aten.sub.Tensor, ungrouped(g, q, scale, zero), cast(g, zero))


def by_column(g: SiteGraph, q: fx.Node, scale: fx.Node, zero: fx.Node) -> fx.Node:
    return g.call(aten.mul.Tensor, cast(g, q), g.argument(torch.rand(1, Q)))


def computed(g: SiteGraph, q: fx.Node, scale: fx.Node, zero: fx.Node) -> fx.Node:
    return g.call(aten.mul.Tensor, cast(g, q), g.call(aten.neg.default, scale))


@pytest.mark.parametrize(
    ("weight", "edits"),
    [(ungrouped, 1), *((f, 0) for f in (twice, zero_last, by_column, computed))],
)
def test_which_integers_become_stored_weights(weight, edits: int) -> None:
    torch.manual_seed(0)
    g, _ = start()
    x = g.argument(torch.randn(3, Q))
    W = weight(g, *integers(g, 1))
    done = g.output(g.call(aten.mm.default, x, transposed(g, W)))
    want = done.result()
    assert done.run(Products()) == edits
    assert error(done.result()[0], want[0]) <= 1e-6


def test_a_bias_of_another_dtype_is_added_to_the_product() -> None:
    torch.manual_seed(0)
    g, _ = start()
    x, bias = g.argument(torch.randn(3, Q)), g.argument(torch.randn(N, dtype=torch.bfloat16))
    product = g.call(aten.mm.default, x, transposed(g, ungrouped(g, *integers(g, 1))))
    done = g.output(g.call(aten.add.Tensor, product, bias))
    want = done.result()
    assert done.run(Products()) == 1
    assert error(done.result()[0], want[0]) <= 1e-6


def test_torchs_product_with_four_bits() -> None:
    """As torchao calls it: slices of all rows and of all columns, and a bias."""
    torch.manual_seed(0)
    g, _ = start()
    x, bias = g.argument(torch.randn(3, Q)), g.argument(torch.randn(16))
    q = torch.randint(16, (16, Q), dtype=torch.int32)
    packed = g.argument(aten._convert_weight_to_int4pack_for_cpu(q, 1))
    factors = g.argument(torch.randn(2, 16, 2))
    y = g.call(aten._weight_int4pack_mm_for_cpu.default, x, packed, 32, factors)
    y = g.call(aten.alias.default, g.call(aten.slice.Tensor, y, 0, 0, sys.maxsize))
    done = g.output(g.call(aten.add.Tensor, g.call(aten.view.default, y, [3, 1, 16]), bias))
    want = done.result()
    assert_expected_inline(
        shown(done, Products()),
        """\
_weight_int4pack_mm_for_cpu = aten._weight_int4pack_mm_for_cpu(x_1, x_3, 32, x_4)
slice = aten.slice.Tensor(_weight_int4pack_mm_for_cpu, 0, 0, 9223372036854775807)
alias = aten.alias(slice)
view = aten.view(alias, [3, 1, 16])
add = aten.add.Tensor(view, x_2)
return add

products: 1 edit

weight_mm = lorafx.weight_mm(x_1, x_3, x_2, None, x_4)
view = aten.view(weight_mm, [3, 1, 16])
return view
""",
    )
    assert error(done.result()[0], want[0]) <= 1e-6


@pytest.mark.parametrize("biased", [False, True])
def test_siblings_with_integers_become_one_op(biased: bool) -> None:
    """Three of one bank, read in an order of their own, and one of another x."""
    torch.manual_seed(0)
    paths = ("a", "b", "c", "d")
    modules = Holder(**{path: nn.Linear(Q, N) for path in paths})
    g = SiteGraph(modules, [0, -1, 2], lowering="inductor", targets=list(paths))
    x, other = g.argument(torch.randn(B, T, Q)), g.argument(torch.randn(B, T, Q))
    g.declare(*paths)
    weights = [integers(g, 1) for _ in paths]
    marks = []
    for path, given, weight in zip(paths, (x, x, other, x), weights, strict=True):
        W = transposed(g, ungrouped(g, *weight))
        rows = g.call(aten.view.default, given, [B * T, Q])
        y = g.call(aten.view.default, g.call(aten.mm.default, rows, W), [B, T, N])
        y = g.call(aten.add.Tensor, y, g.weight(path, "bias")) if biased else y
        marks.append(g.mark(path, given, y, rows=T))
    done = g.output(*marks)
    want = done.result()
    done.run(*FIRST, Products())
    assert done.run(Join()) == len(paths) + 1
    names = [name.partition(".")[0] for name in done.targets()]
    assert [name for name in names if "mm" in name] == ["weight_mms_delta", "weight_mm_delta"]
    for got, expected in zip(done.result(), want, strict=True):
        assert error(got, expected) <= 1e-5
    found = sorted(state.site.path for states in done.ctx.states.values() for state in states)
    assert found == list(paths)
