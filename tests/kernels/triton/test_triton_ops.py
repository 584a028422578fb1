"""The Triton ops: schemas and fakes by opcheck, arguments, layouts, tracing; sources on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from delta_oracle import random_problem
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter
from triton_cases import BF16, STRATEGIES, Case, kernel_of, lora, make_case, run

from lorafx.errors import LoweringError
from lorafx.kernels.ops.op_library import BankArgs
from lorafx.kernels.triton import generated
from lorafx.kernels.triton import ops as triton_ops
from lorafx.kernels.triton.build import LINEAR, ORDER_TILES, build, plan_of, source_of, tiles_for
from lorafx.kernels.triton.generated import launch_wrapped
from lorafx.kernels.triton.ops import columns_of
from lorafx.kernels.triton.tiles import ARCHITECTURES

STRATEGY_OPS = {
    **dict.fromkeys(LINEAR, lora.triton_linear),
    **dict.fromkeys(("segments", "gemv"), lora.triton_delta_),
    "embedding": lora.triton_embedding_delta_,
    "concat": lora.triton_concat_,
}


def case_of(strategy: str) -> Case:
    if strategy == "embedding":
        problem = random_problem(x_shape=(6,), slots=(2, -1, 0), rows=2, sizes=(9,), vocabulary=11)
        return Case(problem, torch.empty(0))
    K = 32 if strategy == "concat" else 24
    return make_case(K=K, sizes=(13, 8), slots=(2, -1, 0), rows=2, rank=4)


def arguments_of(case: Case, strategy: str) -> tuple[object, ...]:
    p, kernel = case.problem, kernel_of(case, strategy)
    first = (p.x, case.weight, case.bias) if strategy in LINEAR else (p.y.clone(), p.x)
    if strategy == "concat":
        more = (0, columns_of(plan_of(kernel).spec, 3))
        first = tuple(torch.nn.functional.pad(t, more) for t in (p.x, case.weight))
    return (*first, *p.bank, p.rows, kernel)


@pytest.mark.parametrize("strategy", STRATEGY_OPS)
def test_opcheck(strategy: str) -> None:
    case = case_of(strategy)
    p = case.problem  # opcheck compares whole arguments, so no NaN
    case = case.with_(A=p.A.nan_to_num(), B=p.B.nan_to_num())
    checks = opcheck(STRATEGY_OPS[strategy], arguments_of(case, strategy))
    assert set(checks.values()) == {"SUCCESS"}


BAD: dict[str, Callable[[Case], dict[str, object]]] = {
    "x is": lambda c: {"x": c.problem.x[:, 1:]},
    "y has 5 rows": lambda c: {"y": c.problem.y[1:]},
    "not part of the bank": lambda c: {"A": c.problem.A.transpose(1, 2).contiguous().mT},
    "B is": lambda c: {"B": c.problem.B[:, :, 1:].contiguous()},
    "a kernel needs proved row ownership": lambda c: {"rows": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message: str) -> None:
    """Refused before y is touched."""
    case = case_of("segments")
    kernel = kernel_of(case, "segments")
    p = case.with_(**BAD[message](case)).problem
    before = p.y.clone()
    with pytest.raises(LoweringError, match=message):
        lora.triton_delta_(p.y, p.x, *p.bank, p.rows, kernel)
    assert torch.equal(p.y, before)


LAUNCHES = {"epilogue": 2, "segments": 3, "gemv": 2}


@pytest.mark.parametrize("strategy", LAUNCHES)
def test_launches_can_be_traced(strategy: str) -> None:
    """What a graph on a GPU holds: the launches, and no other op over y; no device is needed."""
    case = make_case(K=64, sizes=(32, 32), slots=(1, -1, 0, 1), rows=32, dtypes=(BF16,) * 3)
    device = torch.device("cuda")
    kernel = build(case.spec, strategy, rows_hint=128, device=device)
    assert kernel is not None
    p = case.problem
    with FakeTensorMode(shape_env=ShapeEnv()):
        tensors = [
            torch.empty(t.shape, dtype=t.dtype, device=device)
            for t in (p.y, p.x, case.weight, case.bias, *p.bank)
            if t is not None
        ]

    def call(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *bank: Tensor) -> Tensor:
        rows = x.shape[0] // bank[-1].shape[0]
        own = BankArgs(*bank), rows, kernel, launch_wrapped
        if strategy in LINEAR:
            return triton_ops._run_linear(x, weight, bias, *own)
        triton_ops._run_delta(y, x, *own)
        return y

    graph = make_fx(call, tracing_mode="symbolic")(*tensors).graph
    wrapper = torch.ops.higher_order.triton_kernel_wrapper_mutation
    launches = [node for node in graph.nodes if node.target is wrapper]
    assert len(launches) == LAUNCHES[strategy] == len(plan_of(kernel).all_kernels)
    rest = {n.target for n in graph.nodes if n.op == "call_function" and n.target is not wrapper}
    aten = torch.ops.aten
    assert rest <= {aten.new_empty.default, aten.empty.memory_format}


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_storage_types_round_like_torch(dtype: torch.dtype) -> None:
    """y + δ is rounded to nearest even; what the interpreter's own casts get wrong."""
    edges = [0.0, -0.0, 1.0, 1.9999, 65504.0, 3e38, 6e-8, 2e-5, 1e-40, torch.inf, torch.nan]
    values = torch.tensor([*edges, *torch.randn(53).tolist()]).to(dtype)
    for delta in (0.0, 2.0**-8, 2.0**-9, 3e-3, 40.0, -1.0):
        case = make_case(K=1, sizes=(64,), slots=(0,), rank=1, dtypes=(dtype,) * 3)
        y, one = values[None].clone(), torch.ones(1, 1, 1, dtype=dtype)
        b = torch.full((1, 1, 64), delta).to(dtype)
        scales = torch.ones(1, 1)
        laid = case.with_(y=y, x=one[0], A=one, B=b, scales=scales)
        expected = (y.float() + b[0].float()).to(dtype)
        for strategy in ("segments", "gemv"):
            got = run(laid, strategy)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_a_damaged_file_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFX_CACHE_DIR", str(tmp_path))
    spec, arch = make_case(K=24, sizes=(15,), slots=(0,)).spec, ARCHITECTURES["interpreter"]
    tiles = tiles_for("segments", spec.delta, 1, arch)["shrink"]
    key = generated.key_of("shrink", spec, tiles, arch)
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / f"shrink_{key}.py").write_text("def shrink(")
    with pytest.raises(LoweringError, match=f"shrink_{key}.py cannot be imported"):
        generated.load("shrink", spec, tiles, arch)


@pytest.mark.parametrize("strategy", ["split", "epilogue", "segments"])
def test_float32_products_are_not_cut_to_tf32(strategy: str) -> None:
    """On a GPU: the interpreter multiplies in float32 whatever the source says."""
    for dtype, precise in ((torch.float32, True), (torch.bfloat16, False)):
        text = source_of(
            kernel_of(make_case(K=72, sizes=(40,), slots=(0,), dtypes=(dtype,) * 3), strategy)
        )
        products = re.findall(r"tl\.dot\((.*)\)", text)
        assert len(products) >= 2
        assert all(('input_precision="ieee"' in product) == precise for product in products)


def test_interpreting_leaves_triton_as_it_was() -> None:
    """Kernels are compiled ahead of time in the process that interprets them."""

    def names() -> list[dict[str, object]]:
        owners = (tl, tl.core, tl.math, tl.standard, tl.tensor, interpreter)
        return [{n: getattr(o, n) for n in dir(o) if not n.startswith("__")} for o in owners]

    before, options = names(), interpreter.interpreter_builder.options
    case = make_case(K=24, sizes=(13, 8), slots=(2, -1, 0), rows=2, dtypes=(torch.bfloat16,) * 3)
    for strategy in STRATEGIES:
        run(case, strategy)
    assert names() == before
    assert interpreter.interpreter_builder.options is options
    order = generated.load("order", None, ORDER_TILES, ARCHITECTURES["cuda90"])
    signature = {"slots_ptr": "*i32", "order_ptr": "*i32", "count": "i32"}
    source = ASTSource(order.jit, signature, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
