"""A few families of transformers that differ in kind, each against the oracle: sequence first
(xlnet), a mixture of experts (qwen2_moe), a bias of windows that all requests share (swinv2), rows
that Python picks between graphs (led). benchmarks/families.py runs all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import examine

pytestmark = pytest.mark.any_sizes

CASES = (
    ("causal", "qwen2_moe"),
    pytest.param("causal", "xlnet", marks=pytest.mark.slow),
    pytest.param("image", "swinv2", marks=pytest.mark.slow),
    pytest.param("seq2seq", "led", marks=pytest.mark.slow),
)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model_type"), CASES)
def test_family_equals_dense_merge(kind: str, model_type: str, tmp_path: Path) -> None:
    family = next(f for f in tiny.families(kind) if f.model_type == model_type)
    report = examine.examine(family, str(tmp_path), examine.SHAPES[:2])
    assert report["outcome"] == "ok", report
    if model_type == "qwen2_moe":
        assert (report["routers"], report["experts"]) == (2, 4)
        assert "routing" not in report, "they are refused"
        assert "lorafx.expert_site.default" in report["operators"]
    assert report["effect"] > 1e-3, "its adapters change too little for a comparison to mean much"
