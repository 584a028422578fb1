"""Mixed batches over bases of integers, whose products are generated, against W + ΔW of the weights
that their library defines."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from dense_merge import error, random_base
from quantised import KINDS, SIZES, Rounded, adapters, small_base
from toolchain import needs_compiler

import lorafx

pytestmark = pytest.mark.any_sizes

NAMES = ["a", None, "b", "a"]


@needs_compiler
@pytest.mark.slow
def test_products_that_inductor_lowers_by_a_pattern_of_its_own(tmp_path: Path) -> None:
    """In the body of several layers."""
    base = random_base("llama", **SIZES | {"num_hidden_layers": 3})
    base = base.to(torch.bfloat16)
    model = copy.deepcopy(base)
    KINDS["torchao-int8"][0](model)
    model.eval().requires_grad_(False)
    case = Rounded(base, copy.deepcopy(model), adapters(base, tmp_path))
    cm = lorafx.compile(model, case.folders, options={"passes": {"products": False}})
    given = {"input_ids": torch.randint(3, 61, (4, 5)), "use_cache": False}
    got = cm(**given, adapter_names=NAMES).logits
    assert error(got, case.dense().expected(NAMES, given)) <= 0.03


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-int4-groups", "torchao-int4-packed"])
def test_mixed_batches(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = small_base().to(dtype)
    model = copy.deepcopy(base)
    KINDS[kind][0](model)
    model.eval().requires_grad_(False)
    case = Rounded(base, copy.deepcopy(model), adapters(base, tmp_path))
    cm = lorafx.compile(model, case.folders)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for length in (1, 5, 40):  # 4 to 160 rows: of the last, W is widened
        given = {"input_ids": torch.randint(3, 61, (4, length))}
        got = cm(**given, adapter_names=NAMES).logits
        want = case.dense().expected(NAMES, given)
        assert error(got, want) <= tolerance
        alone = cm(input_ids=given["input_ids"][2:3], adapter_names=["b"]).logits
        assert error(alone, want[2:3]) <= tolerance
    passes = {report.name: report.edits for report in cm._session.backend.records[0].passes}
    assert passes["products"] == 8  # with the head's, which is dense
    assert passes["join"] == 6  # five, and siblings of one x become one op
