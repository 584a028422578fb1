"""Tensors that are not contiguous: right results, and no hidden copy of x, W or a bank.

A *hidden copy* is an allocation at least half as large as the smallest of x, W and the bank's two
factors, which the same call makes for this layout and not for the contiguous one. What the base's
own product allocates for a layout is not counted: the base model makes that copy too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from delta_oracle import Problem, assert_delta, random_problem
from dense_merge import Case, error, save_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lorafx
from lorafx.errors import LoweringError
from lorafx.kernels.compiler import find_compiler
from lorafx.kernels.cpu import DeltaSpec, build

lora = torch.ops.lorafx


def _has_compiler() -> bool:
    try:
        find_compiler()
    except LoweringError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="needs a C++ compiler")


def allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes of each tensor that `call` allocates, by torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = record.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def large(call: Callable[[], Any], least: int) -> int:
    """How many allocations of at least half of `least` bytes `call` makes."""
    return sum(size >= least // 2 for size in allocations(call))


# --- layouts: the same values, other strides ---


def row_stride(t: Tensor) -> Tensor:
    return torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]]


def elements_apart(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def rows_apart(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -2)[..., 0, :]


def last_first(t: Tensor) -> Tensor:
    """Stored with the last dimension outermost: of a matrix, column by column."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def first_two_swapped(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row stride": row_stride,
    "elements apart": elements_apart,
    "rows apart": rows_apart,
    "last first": last_first,
    "first two swapped": first_two_swapped,
}


def spec_of(p: Problem) -> DeltaSpec:
    if p.embedding:
        return DeltaSpec.of_embedding(p.y, p.A, p.B)
    return DeltaSpec.linear(p.y, p.x, p.A, p.B, p.ranks, *p.ranges)


def add(p: Problem, *, generated: bool) -> Tensor:
    """y after the delta was added into a copy of it of the same strides."""
    y = torch.empty_strided(p.y.shape, p.y.stride()).copy_(p.y)
    kernel = build(spec_of(p)) if generated else 0
    assert kernel is not None
    if p.embedding:
        lora.add_embedding_delta_(y, p.x, *p.bank, p.rows, kernel)
    else:
        lora.add_delta_(y, p.x, *p.bank, *p.ranges, p.rows, kernel)
    return y


# --- ops, any strides ---


@st.composite
def strided(draw: st.DrawFn, t: Tensor) -> Tensor:
    """`t` with its values in a buffer in which its dimensions lie in another order, at other steps,
    after an offset; what lies between is NaN (0 for ids)."""
    order = draw(st.permutations(range(t.dim())))
    steps = draw(st.lists(st.integers(1, 3), min_size=t.dim(), max_size=t.dim()))
    offset = draw(st.integers(0, 3))
    strides, reach = [0] * t.dim(), 1
    for dim in order:
        strides[dim] = reach * steps[dim]
        reach = strides[dim] * t.shape[dim]
    gap = torch.nan if t.is_floating_point() else 0
    buffer = torch.full((offset + max(reach, 1),), gap, dtype=t.dtype)
    return buffer.as_strided(t.shape, strides, offset).copy_(t)


@st.composite
def problems(draw: st.DrawFn, vocabulary: int | None = None) -> Problem:
    leading = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    rows = draw(st.integers(1, 3))
    sizes = (11,) if vocabulary else (11, 6)
    return random_problem(
        x_shape=leading if vocabulary else (*leading, 19),
        slots=draw(st.lists(st.integers(-1, 3), min_size=1, max_size=4)),
        rows=rows,
        sizes=sizes,
        vocabulary=vocabulary,
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("vocabulary", [None, 23])
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_aten_takes_any_strides(vocabulary: int | None, data: st.DataObject) -> None:
    """x, y, A, B, ranks, scales and slots, each laid out at random."""
    p = data.draw(problems(vocabulary))
    fields = ("x", "y", "A", "B", "ranks", "scales", "slots")
    laid = p.with_(**{name: data.draw(strided(getattr(p, name))) for name in fields})
    assert_delta(p, add(laid, generated=False))


@needs_compiler
@pytest.mark.parametrize("vocabulary", [None, 23])
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_generated_kernels_take_any_strides_of_x_and_y(
    vocabulary: int | None, data: st.DataObject
) -> None:
    p = data.draw(problems(vocabulary))
    laid = p.with_(x=data.draw(strided(p.x)), y=data.draw(strided(p.y)))
    kernel = build(spec_of(p))
    assert kernel is not None
    op = lora.run_embedding_delta_ if p.embedding else lora.run_delta_
    op(laid.y, laid.x, *laid.bank, p.rows, kernel)
    assert torch.equal(laid.y, add(p, generated=True))


@needs_compiler
def test_generated_kernels_take_some_siblings_of_a_bank() -> None:
    """As a weight that is used without its module finds them: views with the strides of all."""
    p = random_problem(x_shape=(5, 19), slots=(2, -1, 0, 1, 3), rows=1, sizes=(11, 6, 9))
    R = p.B.shape[1]
    for first, last, columns in ((0, 1, (0, 11)), (1, 2, (11, 17)), (1, 3, (11, 26))):
        part = p.with_(
            y=p.y[:, columns[0] : columns[1]].clone(),
            A=p.A[:, first * R : last * R],
            B=p.B[:, :, columns[0] : columns[1]],
            ranks=p.ranks[:, first:last],
            scales=p.scales[:, first:last],
            siblings=list(range(last - first)),
            offsets=[0, 6][: last - first],
            sizes=p.sizes[first:last],
        )
        assert_delta(part, add(part, generated=True))


@needs_compiler
def test_a_transposed_bank_is_refused_by_kernels_and_served_by_aten() -> None:
    p = random_problem(x_shape=(5, 19), slots=(2, -1, 0), rows=1, sizes=(11,))
    kernel = build(spec_of(p))
    for name in ("A", "B"):
        laid = p.with_(**{name: last_first(getattr(p, name))})
        assert build(spec_of(laid)) is None
        assert_delta(laid, add(laid, generated=False))
        with pytest.raises(RuntimeError, match="A and B are not a bank of the kernel's"):
            lora.run_delta_(p.y, p.x, *laid.bank, p.rows, kernel)


# --- ops, what they allocate ---


def big_problem() -> Problem:
    return random_problem(
        x_shape=(6, 50, 400), slots=(2, -1, 0, 1, 1, 3), rows=50, sizes=(300,), max_rank=64
    )


@pytest.mark.parametrize("tensor", ["x", "y", "A", "B"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_aten_copies_nothing_for_a_layout(layout: str, tensor: str) -> None:
    p = big_problem()
    least = min(t.nbytes for t in (p.x, p.A, p.B))
    laid = p.with_(**{tensor: LAYOUTS[layout](getattr(p, tensor))})
    for op in ("add", "site"):

        def call(q: Problem, op: str = op) -> None:
            if op == "add":
                lora.add_delta_(q.y, q.x, *q.bank, *q.ranges, q.rows, 0)
            else:
                lora.site(q.x, q.y, *q.bank, *q.ranges, q.rows)

        wanted = large(lambda: call(p), least)
        assert large(lambda: call(laid), least) == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_linear_copies_what_the_base_does(layout: str) -> None:
    p = big_problem()
    torch.manual_seed(0)
    weight, bias = torch.randn(300, 400), elements_apart(torch.randn(300))
    least = min(t.nbytes for t in (p.x, p.A, p.B, weight))

    def fused(x: Tensor, w: Tensor) -> Tensor:
        return lora.fused_linear(x, w, bias, *p.bank, *p.ranges, p.rows, False)

    def extra(x: Tensor, w: Tensor) -> int:
        return large(lambda: fused(x, w), least) - large(lambda: F.linear(x, w, bias), least)

    lay = LAYOUTS[layout]
    for x, w in ((lay(p.x), weight), (p.x, lay(weight)), (p.x[:1].expand(6, 50, 400), weight)):
        assert extra(x, w) == extra(p.x, weight)
        base = F.linear(x, w, bias)
        assert_delta(p.with_(x=x, y=base), fused(x, w))


def peak_growth(call: Callable[[], Any]) -> int:
    """Bytes by which the process's memory grows while `call` runs, malloc's included."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) << 10

    try:
        reset.write_text("5")  # the peak starts again from what is held now
    except OSError:
        pytest.skip("this system does not let a process reset its peak of memory")
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


@needs_compiler
@pytest.mark.parametrize("layout", ["first two swapped", "last first", "elements apart"])
def test_a_generated_kernel_allocates_its_scratch_only(layout: str) -> None:
    """x and y have 16 MB each; malloc is not torch's, so the process is asked."""
    p = random_problem(x_shape=(16, 256, 1024), slots=(0, 1, -1, 2), rows=256, sizes=(1024,))
    lay = LAYOUTS[layout]
    laid = p.with_(x=lay(p.x), y=lay(p.y))
    kernel = build(spec_of(p))
    expected = add(p, generated=True)

    def call() -> None:
        lora.run_delta_(laid.y, laid.x, *laid.bank, laid.rows, kernel)

    grown = peak_growth(call)
    assert torch.equal(laid.y, expected)
    assert grown < p.x.nbytes // 2


# --- whole models ---


class Layouts(nn.Module):
    """x that is transposed, expanded and sliced on its way to siblings and to lone linears."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(64, 48)
        self.k = nn.Linear(64, 32)
        self.v = nn.Linear(64, 64, bias=False)
        self.flat = nn.Linear(64, 24)
        self.head = nn.Linear(40, 56)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        turned = x.transpose(1, 2)  # (B, K, T)
        back = turned.contiguous().transpose(1, 2)  # values of x, stored (B, K, T)
        y = torch.cat([self.q(back), self.k(back), F.linear(back, self.v.weight)], -1)
        first = x[:, :1].expand(x.shape)
        y = torch.cat([y, self.flat(first)], -1)
        return {"logits": self.head(y[..., 8:168:4])}


def lay_out(model: Layouts) -> Layouts:
    """Weights column by column, in a larger buffer, and every other element of one."""
    layouts = {"q": last_first, "k": row_stride, "v": elements_apart, "flat": rows_apart}
    for name, lay in layouts.items():
        linear = model.get_submodule(name)
        linear.weight = nn.Parameter(lay(linear.weight.detach()), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(elements_apart(linear.bias.detach()), requires_grad=False)
    return model


@pytest.fixture(scope="module")
def strided_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    base = Layouts().eval().requires_grad_(False)
    folder = tmp_path_factory.mktemp("layouts")
    targets = ["q", "k", "v", "flat", "head"]
    folders = {
        name: save_adapter(base, folder / name, rank=rank, targets=targets, seed=rank)
        for name, rank in (("a", 2), ("b", 5))
    }
    return Case(base, folders)


@pytest.mark.parametrize("lowering", ["reference", "inductor", "triton"])
def test_models_of_strided_weights_and_activations(strided_case: Case, lowering: str) -> None:
    model = lay_out(strided_case.model())
    strides = {name: p.stride() for name, p in model.named_parameters()}
    cm = lorafx.compile(
        model, strided_case.folders, options={"lowering": lowering, "verify": "lint"}
    )
    assert {name: p.stride() for name, p in model.named_parameters()} == strides
    torch.manual_seed(1)
    names = ["a", None, "b", "a"]
    layouts = ("last first", "first two swapped")[: 2 if lowering == "reference" else 1]
    for layout in layouts:
        x = LAYOUTS[layout](torch.randn(4, 6, 64))
        got = cm(x=x, adapter_names=names)["logits"]
        assert error(got, strided_case.expected(names, {"x": x})) <= 1e-5


class Broken(nn.Module):
    """A frame of its own, whose weight is used without its module."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.other = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + F.linear(x, self.q.weight)


class TwoBroken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Broken(), Broken()])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"logits": x}


@pytest.mark.parametrize("lowering", ["reference", "inductor"])
def test_a_graph_that_two_layers_share_knows_how_their_banks_lie(
    lowering: str, tmp_path: Path
) -> None:
    """One layer's q stands in a bank with a sibling and the other's alone: aten takes both, and
    code that was generated for one of them is refused for the other."""
    torch.manual_seed(0)
    base = TwoBroken().eval().requires_grad_(False)
    folder = save_adapter(base, tmp_path / "a", rank=2, targets=["q"])
    case = Case(base, {"a": folder})
    config = lorafx.LoraConfig(["layers.0.q", "layers.1.q", "layers.1.other"])
    cm = lorafx.compile(case.model(), config, adapters=case.folders, options={"lowering": lowering})
    x = torch.randn(2, 3, 8)
    if lowering == "reference":
        got = cm(x, adapter_names=["a", "a"])["logits"]
        assert error(got, case.expected(["a", "a"], {"x": x})) <= 1e-5
        return
    with pytest.raises(lorafx.CaptureError, match=r"layers.1.q shares a graph with a layer"):
        cm(x, adapter_names=["a", "a"])


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(512, 320)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@needs_compiler
def test_models_allocate_for_a_layout_what_the_base_does(tmp_path: Path) -> None:
    """With adapters as without: no copy of x, W or the bank beside those of the base's graph."""
    torch.manual_seed(0)
    base = OneLinear().eval().requires_grad_(False)
    folder = save_adapter(base, tmp_path / "a", rank=16, targets=["proj"])
    x, added = torch.randn(8, 64, 512), {}
    for layout in ("contiguous", "row stride", "last first", "first two swapped"):
        lay, model = LAYOUTS.get(layout, lambda t: t), copy.deepcopy(base)
        if layout != "first two swapped":
            model.proj.weight = nn.Parameter(lay(model.proj.weight.detach()), requires_grad=False)
        cm = lorafx.compile(model, {"a": folder}, options={"verify": "off"})
        laid, names = lay(x), ["a", None] * 4
        least = min(x.nbytes, model.proj.weight.numel() * 4, cm.memory()["banks"] // 3)
        calls = (lambda: cm(laid), lambda: cm(laid, adapter_names=names))  # noqa: B023
        for call in calls:  # compiled before they are measured
            call()
        without, mixed = (large(call, least) for call in calls)
        added[layout] = mixed - without
    assert set(added.values()) == {0}
