"""What is made of a base weight after loading: absorbed MLA, weights used by groups, metadata.

The oracle of absorbed attention is the model that does not absorb: transformers' DeepseekV3 with
W + ΔW merged into `kv_b_proj`, each row alone.
"""

from __future__ import annotations

import pytest
import torch
from absorbed import AbsorbedInForward, OneLayer, absorbed, case_of, post_process, states
from dense_merge import REFERENCE, Case, check_mixed, error
from torch import nn

import lorafx
from lorafx.errors import MatchError

NAMES = ["a", None, "b", "a", "c"]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One attention as transformers computes it."""
    return case_of(OneLayer, tmp_path_factory.mktemp("layer"))


@pytest.mark.parametrize(
    ("kept", "product"),
    [
        ("views", "bmm"),
        ("permuted copies", "matmul"),
    ],
)
def test_absorbed_weights_carry_the_delta(layer: Case, kept: str, product: str) -> None:
    """Post-processed on the compiled model, before its first call."""
    model = absorbed(layer, product=product)
    cm = lorafx.compile(model, layer.folders, options=REFERENCE)
    post_process(model, kept)
    check_mixed(cm, layer, NAMES, states(5, 4))
    graphs = cm.recompiles
    check_mixed(cm, layer, NAMES[:3], states(3, 7))
    check_mixed(cm, layer, ["b"] * 4, states(4, 2))
    assert cm.recompiles == graphs
    assert "refused" not in str(cm.explain())


def test_absorbed_in_every_forward(layer: Case) -> None:
    model = absorbed(layer, AbsorbedInForward, "matmul")
    cm = lorafx.compile(model, layer.folders, options=REFERENCE, dynamic=False)
    check_mixed(cm, layer, NAMES, states(5, 4))


def test_post_processed_again(layer: Case) -> None:
    """New copies of the same parts are served by the same graph; what else takes their place is
    refused."""
    model = absorbed(layer)
    cm = lorafx.compile(model, layer.folders, options=REFERENCE)
    post_process(model, "copies")
    check_mixed(cm, layer, NAMES, states(5, 4))
    graphs = cm.recompiles
    post_process(model, "copies")
    check_mixed(cm, layer, NAMES, states(5, 4))
    assert cm.recompiles == graphs
    model.self_attn.w_uk = model.self_attn.w_uk * 2
    inputs = states(2, 4)
    with pytest.raises(MatchError, match=r"the weight of self_attn\.kv_b_proj has changed since"):
        cm(**inputs, adapter_names=["a", "b"])
    with torch.no_grad():
        base = model(**inputs)["logits"]
    assert error(cm(**inputs, adapter_names=["c", None])["logits"][1], base[1]) <= 1e-5


@pytest.mark.slow
def test_under_torch_compile(layer: Case) -> None:
    """Marked models that their users compile, the second one on the first one's graph. Only
    kv_b_proj is a site, so that no mark stands in the graph."""
    for _ in range(2):
        model = lorafx.attach(
            absorbed(layer), adapters={"a": layer.folders["a"]}, options=REFERENCE
        )
        post_process(model, "copies")
        compiled = torch.compile(model, backend="lorafx", dynamic=True)
        inputs = states(3, 4)
        with torch.no_grad():
            assert error(compiled(**inputs)["logits"], layer.base(**inputs)["logits"]) <= 1e-5
            with lorafx.adapters(model, ["a", None, "a"]):
                got = compiled(**inputs)["logits"]
        assert error(got, layer.expected(["a", None, "a"], inputs)) <= 1e-5
        lorafx.detach(model)


# What is refused: never dropped


def _scaled(attention: nn.Module) -> None:
    attention.w_uk = attention.w_uk * 0.25


def _slanted(attention: nn.Module) -> None:
    """A view that is no regular part of the weight."""
    w = attention.kv_b_proj.weight.detach()
    attention.w_uk = w.as_strided(attention.w_uk.shape, (w.shape[1], w.shape[1] + 1, 1))


@pytest.mark.parametrize("change", [_scaled, _slanted])
def test_parts_that_no_rule_follows_are_refused_by_name(layer: Case, change) -> None:
    model = absorbed(layer)
    cm = lorafx.compile(model, layer.folders, options=REFERENCE, dynamic=False)
    post_process(model, "copies")
    change(model.self_attn)
    inputs = states(3, 4)
    refusal = (
        r"at self_attn\.kv_b_proj: (its weight is used in a way that no rule covers|"
        r"(parts of|nothing uses) its weight.* computes with self_attn\.w_u[kv])"
    )
    with pytest.raises(MatchError, match=refusal) as caught:
        cm(**inputs, adapter_names=["a", None, "b"])
    assert "exclude_modules" in str(caught.value)
    with torch.no_grad():
        base = model(**inputs)["logits"]
    assert error(cm(**inputs, adapter_names=["c", None, "c"])["logits"][1], base[1]) <= 1e-5


def test_excluded_projections_absorb_freely(layer: Case) -> None:
    model = absorbed(layer)
    chosen = lorafx.LoraConfig(target_modules=["o_proj"])
    folders = {"c": layer.folders["c"]}
    cm = lorafx.compile(model, chosen, adapters=folders, options=REFERENCE, dynamic=False)
    post_process(model, "copies")
    check_mixed(cm, layer, ["c", None, "c"], states(3, 4))
