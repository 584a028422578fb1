"""Generated Triton sources: the cache on disk, ids, what a file says, Triton left as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter
from triton_cases import STRATEGIES, kernel_of, make_case, run

from lorafx.errors import LoweringError
from lorafx.kernels.triton import generated
from lorafx.kernels.triton.build import ORDER_TILES, source_of, tiles_for
from lorafx.kernels.triton.tiles import ARCHITECTURES


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
