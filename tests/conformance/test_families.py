"""A few families of transformers that differ in kind, each against the oracle.

benchmarks/families.py runs all of them.

What makes them different: sequence first (xlnet), a mixture of experts (qwen2_moe), a state space
model whose weights are used without their modules (mamba), an encoder and decoder (t5), flattened
rows (opt), images (vit), audio (wav2vec2), learned positions shared by all rows (bert), layers
whose rows all requests share (a bias of windows in swinv2, relative positions in
wav2vec2-conformer, seamless_m4t and sew-d, a scale in voxtral_realtime), rows that Python picks
between graphs: by language (xmod), by expert (longcat_flash), in windows (led); images that are
written into the text (llava: listed one by one; paligemma: whole; smolvlm: those that are no
padding).
"""

from __future__ import annotations

from pathlib import Path

import examine
import pytest
import tiny
from sites import sites_of
from tiny_inputs import inputs

CASES = (
    pytest.param("causal", "xlnet", marks=pytest.mark.slow),
    ("causal", "qwen2_moe"),
    pytest.param("causal", "mamba", marks=pytest.mark.slow),
    pytest.param("image", "swin", marks=pytest.mark.slow),  # as swinv2, but for its bias
    pytest.param("audio", "wav2vec2", marks=pytest.mark.slow),
    pytest.param("masked", "xmod", marks=pytest.mark.slow),
    pytest.param("image", "swinv2", marks=pytest.mark.slow),
    pytest.param("audio", "wav2vec2-conformer", marks=pytest.mark.slow),
    pytest.param("audio", "sew-d", marks=pytest.mark.slow),
    pytest.param("seq2seq", "seamless_m4t", marks=pytest.mark.slow),
    pytest.param("seq2seq", "voxtral_realtime", marks=pytest.mark.slow),
    pytest.param("causal", "longcat_flash", marks=pytest.mark.slow),
    pytest.param("seq2seq", "led", marks=pytest.mark.slow),
    pytest.param("image-text", "llava", marks=pytest.mark.slow),
    pytest.param("image-text", "paligemma", marks=pytest.mark.slow),
    pytest.param("image-text", "smolvlm", marks=pytest.mark.slow),
)


@pytest.mark.parametrize(("kind", "model_type"), CASES)
def test_family_equals_dense_merge(kind: str, model_type: str, tmp_path: Path) -> None:
    family = next(f for f in tiny.families(kind) if f.model_type == model_type)
    # Dynamo unrolls mamba's loop over tokens, once for each length.
    shapes = examine.SHAPES[: 1 if model_type == "mamba" else 2]
    report = examine.examine(family, str(tmp_path), shapes)
    assert report["outcome"] == "ok", report
    if model_type == "qwen2_moe":
        assert (report["routers"], report["experts"]) == (2, 4)
        assert "routing" not in report, "they are refused"
        assert "lorafx.expert_site.default" in report["operators"]
    if kind == "image-text":
        assert "pixel_values" in report["inputs"], "it ran without images"
    assert report["effect"] > 1e-3, "its adapters change too little for a comparison to mean much"


@pytest.mark.quick
def test_routers_and_experts_are_found_by_what_they_do() -> None:
    family = next(f for f in tiny.families("causal") if f.model_type == "qwen2_moe")
    model = tiny.build(family, num_hidden_layers=1, layer_types=["full_attention"])
    sites = sites_of(model, inputs(model, "causal", 2, 3))
    assert sites.routers == ("model.layers.0.mlp.gate.weight",)
    assert sites.experts == tuple(
        f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    )
    assert sites.embeddings == ("model.embed_tokens",)
