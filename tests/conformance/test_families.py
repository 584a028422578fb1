"""A few families of transformers that differ in kind, each against the oracle: sequence first
(xlnet), a mixture of experts (qwen2_moe), a bias of windows that all requests share (swinv2), rows
that Python picks between graphs (led). benchmarks/families.py runs all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from tiny_inputs import inputs

import lorafx

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import examine

CASES = (
    ("causal", "qwen2_moe"),
    pytest.param("causal", "xlnet", marks=pytest.mark.slow),
    pytest.param("image", "swinv2", marks=pytest.mark.slow),
    pytest.param("seq2seq", "led", marks=pytest.mark.slow),
)
SHORT = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
NAMES = ["all", None, "even"]


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


@pytest.mark.slow
def test_images_of_prompts_with_different_adapters(tmp_path):
    """The forward encodes the images: whose features those are is proved inside of it alone."""
    family = next(f for f in tiny.families("image-text") if f.model_type == "llava")
    model = tiny.build(family)
    batch = inputs(model, family.kind, len(NAMES), 6, padding=False)
    assert len(batch["pixel_values"]) == len(NAMES)
    adapters = oracle.standard_adapters(model, tmp_path)
    reference = oracle.Oracle.of(model, adapters)
    cm = lorafx.compile(model, adapters, options={"lowering": "reference"})
    got = cm.generate(**batch, **SHORT, adapter_names=NAMES)
    base = reference.base.generate(**batch, **SHORT)
    for row, name in enumerate(NAMES):
        one = oracle.one_row(batch, row)
        want = reference.model(name).generate(**one, **SHORT)[0]
        assert torch.equal(got[row], want)
        assert (name is None) == torch.equal(want, base[row])
