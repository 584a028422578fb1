"""`lorafx::weight_mm` by a dense weight against float64: few rows, and many."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from unittest.mock import Mock

import pytest
import torch
from toolchain import needs_compiler
from torch import Tensor
from torch.utils._pytree import tree_map_only
from waiting import LONG

from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu import compiler, weight_mm
from lorafx.kernels.cpu.compiler import Isa, runnable_isas
from lorafx.kernels.cpu.weight_source import WeightSpec

lora = torch.ops.lorafx
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = [isa for isa in runnable_isas() if weight_mm.GENERATED.generates(isa)]


def dense(dtype: torch.dtype) -> WeightSpec:
    return WeightSpec(dtype, dtype)


def operands(
    rows: int, features: int, columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(bias, x, weight), the weight somewhere in a larger buffer."""
    torch.manual_seed(rows)
    x = torch.randn(rows, features).to(dtype)
    buffer = torch.randn(columns + 5, features).to(dtype)
    return torch.randn(columns + 3).to(dtype)[3:], x, buffer[5:]


def check(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Within the rounding of K products, their float32 sums and the result (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1 and 3.5)."""
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    precise, sums = torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps
    want = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    bound = precise * want.abs() + (x.shape[1] + 2) * min(sums, precise) * size + 1e-7
    assert bool(((got.double() - want).abs() <= bound).all())


@pytest.fixture
def any_rows(tried_anew: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The generated kernel takes any number of rows. After the test, this process has the kernels
    and the limits of others again."""
    monkeypatch.setattr(weight_mm, "max_rows", lambda spec: 10**6)
    yield
    monkeypatch.undo()
    weight_mm.GENERATED.forget()
    assert all(weight_mm.ready(dense(dtype)) for dtype in DTYPES)


@pytest.fixture(params=["aten", "onednn", "float32"])
def library(request) -> Iterator[None]:
    """What multiplies many rows, on any CPU."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("a torch without oneDNN")
    weight_mm.ready(dense(torch.float32))
    set_many(request.param == "onednn", request.param == "float32")
    yield
    set_many(None, None)


def set_many(onednn: bool | None, float32: bool | None) -> None:
    library = weight_mm.op_library()
    weight_mm.many_by_onednn(library, onednn)
    for dtype in (torch.bfloat16, torch.float16):
        weight_mm.many_in_float32(library, dtype, float32)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.usefixtures("any_rows")
def test_generated_kernels(isa: Isa, dtype: torch.dtype) -> None:
    """Tiles of every height, columns that fill no group or vector, features that fill no step."""
    weight_mm.GENERATED.load(dense(dtype), isa)
    for rows in (1, 2, 3, 4, 5, 6, 7, 10, 13, 70):
        for features, columns in ((1, 1), (40, 130), (129, 47), (17, 3)):
            bias, x, weight = operands(rows, features, columns, dtype)
            check(lora.weight_mm(x, weight), x, weight)
            check(lora.weight_mm(x, weight, bias), x, weight, bias)


@needs_compiler
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [None, [], [7, 0, 40]], ids=str)
@pytest.mark.usefixtures("library")
def test_any_number_of_rows(dtype: torch.dtype, sizes: list[int]) -> None:
    """At the edge where the library takes over, which multiplies part by part."""
    most = weight_mm.max_rows(dense(dtype))
    for rows in (0, most, most + 1):
        bias, x, weight = operands(rows, 33, 47, dtype)
        check(lora.weight_mm(x, weight, sizes=sizes), x, weight)
        check(lora.weight_mm(x, weight, bias, sizes=sizes), x, weight, bias)


def test_few_rows_where_only_aten_has_matrix_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is too old for them, or there is none."""
    vectors = next(isa for isa in compiler.ISAS if isa.name == "avx512_bf16")
    monkeypatch.setattr(weight_mm, "has_matrix_tiles", lambda: True)
    monkeypatch.setattr(weight_mm, "best_isa", lambda: vectors)
    assert weight_mm.max_rows(dense(torch.bfloat16)) == weight_mm.MAX_ROWS_BESIDE_TILES
    assert weight_mm.max_rows(dense(torch.float32)) == weight_mm.MAX_ROWS
    monkeypatch.setattr(weight_mm, "best_isa", Mock(side_effect=LoweringError("no compiler")))
    assert weight_mm.max_rows(dense(torch.bfloat16)) == weight_mm.MAX_ROWS_BESIDE_TILES


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("float32", [False, True])
def test_many_rows_in_float32(dtype: torch.dtype, float32: bool) -> None:
    """W in blocks, of which the last is smaller; with strides; of integers."""
    set_many(None, float32)
    try:
        bias, x, weight = operands(300, 40, 600, dtype)
        with torch.profiler.profile() as seen:
            got = lora.weight_mm(x, weight)
        assert ("aten::copy_" in {event.key for event in seen.key_averages()}) is float32
        check(got, x, weight)
        check(lora.weight_mm(x, weight, bias), x, weight, bias)
        apart, columns = x.T.contiguous().T, weight.T.contiguous().T  # of stride M, and N
        check(lora.weight_mm(apart, columns, bias[:1].expand(600)), x, weight, bias[:1].expand(600))
        form = WeightSpec(dtype, torch.int8, torch.float32)
        assert weight_mm.ready(form)
        q, scale = torch.randint(-9, 9, weight.shape, dtype=torch.int8), torch.rand(600, 1)
        check(lora.weight_mm(x, q, scale=scale), x, (q * scale).to(dtype))
    finally:
        set_many(None, None)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_every_batch(dtype: torch.dtype) -> None:
    _, x, weight = operands(weight_mm.max_rows(dense(dtype)), 133, 75, dtype)
    together = lora.weight_mm(x, weight)
    for rows in (1, 2, 3, 5, 6, 7, 11, 32):
        assert torch.equal(lora.weight_mm(x[:rows], weight), together[:rows])
    assert torch.equal(lora.weight_mm(x[5:6], weight), together[5:6])
    x[4] = torch.inf  # which no neighbour has a part of
    assert torch.equal(lora.weight_mm(x, weight)[5:], together[5:])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_fixed_rows_are_the_same_in_batches_of_any_size(dtype: torch.dtype, threads: int) -> None:
    few = weight_mm.max_rows(dense(dtype))
    bias, x, weight = operands(2 * few + 5, 1024, 75, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = lora.weight_mm(x, weight, bias, fixed=True)
        check(together, x, weight, bias)
        for rows in (1, 3, few, few + 1):
            got = lora.weight_mm(x[:rows], weight, bias, fixed=True)
            assert torch.equal(got, together[:rows])
    finally:
        torch.set_num_threads(before)
    if dtype == torch.float32:  # otherwise the library's order is another
        assert not torch.equal(lora.weight_mm(x, weight, bias), together)


@needs_compiler
def test_a_fixed_product_without_a_kernel_is_refused() -> None:
    _, x, weight = operands(3, 8, 5, torch.float64)
    with pytest.raises(RuntimeError, match="no generated product"):
        lora.weight_mm(x, weight, fixed=True)
    _, x, _ = operands(8, 5, 5, torch.float32)
    with pytest.raises(RuntimeError, match="no generated product"):
        lora.weight_mm(x.T, torch.randn(6, 8), fixed=True)


@needs_compiler
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [[], [3, 6]], ids=str)
def test_opcheck(bias: bool, sizes: list[int]) -> None:
    added, x, weight = operands(3, 5, 9, torch.float32)
    arguments = x, weight, added if bias else None, sizes
    assert set(torch.library.opcheck(lora.weight_mm.default, arguments).values()) == {"SUCCESS"}


@needs_compiler
def test_a_graph_of_another_process_loads_the_kernel_of_its_dtype() -> None:
    program = """
import torch
from lorafx.kernels.cpu.weight_mm import GENERATED, ready
from lorafx.kernels.cpu.weight_source import WeightSpec
assert ready(WeightSpec(torch.float32, torch.float32))
x, weight = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(3, 8, dtype=torch.bfloat16)
torch.ops.lorafx.weight_mm(x, weight)
assert GENERATED.has(WeightSpec(torch.bfloat16, torch.bfloat16))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=LONG)


@pytest.mark.usefixtures("refused_sources")
def test_a_refused_source() -> None:
    """The ops' own implementations, which run until a kernel is loaded."""
    bias, x, weight = operands(3, 5, 9, torch.float32)
    with pytest.warns(LorafxWarning, match="stay with aten: refused"):
        check(weight_mm.product(x, weight), x, weight)
    check(weight_mm.product(x, weight, bias, sizes=[4, 5]), x, weight, bias)


@needs_compiler
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, s: (x[:, :-1], w, s), "do not fit together|4 columns, weight has 5"),
        (lambda x, w, s: (x, w[0], s), "do not fit together|weight \\(N, K\\)"),
        (lambda x, w, s: (x, w, [3, 5]), "do not add up to"),
        (lambda x, w, s: (x, w.double(), s), "differ in dtype"),
        (lambda x, w, s: (x, w[:-1], []), "bias"),
    ],
)
def test_bad_operands(bias, change, message) -> None:
    """Refused by the kernel, and by the fake one when a graph is traced."""
    added, x, weight = operands(100, 5, 9, torch.float32)
    if message == "bias" and not bias:
        pytest.skip("it takes none")
    x, weight, sizes = change(x, weight, [4, 5])
    given = x, weight, added if bias else None, sizes
    with pytest.raises(RuntimeError, match=message):
        lora.weight_mm(*given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = tree_map_only(Tensor, mode.from_tensor, given)
        with pytest.raises((LoweringError, RuntimeError), match=message):
            lora.weight_mm(*fake)


@needs_compiler
@pytest.mark.parametrize("rows", [0, 3, 100])
def test_a_bias_of_another_dtype_is_refused(rows: int) -> None:
    """As torch does, for any number of rows."""
    bias, x, weight = operands(rows, 5, 9, torch.bfloat16)
    for function in (lora.weight_mm, torch.nn.functional.linear):
        with pytest.raises(RuntimeError, match="dtype"):
            function(x, weight, bias.float())
    with pytest.raises(LoweringError, match=r"bias is \(9,\) of torch.bfloat16"):
        weight_mm.product_fake(x, weight, bias.float())
