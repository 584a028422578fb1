"""What is made of a base weight after loading: absorbed MLA, weights used by groups, metadata,
formats of their own.

The oracle of absorbed attention is the model that does not absorb: transformers' DeepseekV3 with
W + ΔW merged into `kv_b_proj`, each row alone.
"""

from __future__ import annotations

import copy

import pytest
import torch
from absorbed import AbsorbedInForward, OneLayer, absorbed, case_of, parts, post_process, states
from dense_merge import REFERENCE, Case, case_by_targets, check_mixed, error
from slowly import few
from torch import Tensor, nn

import lorafx
from lorafx.errors import MatchError
from lorafx.layers import ReplicatedLinear
from lorafx.layers.base import Int8ChannelLinearMethod

pytestmark = pytest.mark.any_sizes

NAMES = ["a", None, "b", "a", "c"]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One attention as transformers computes it."""
    return case_of(OneLayer, tmp_path_factory.mktemp("layer"))


@pytest.mark.parametrize(
    ("kept", "product"), few([("views", "bmm"), ("permuted copies", "matmul")], "permuted copies")
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


class Latent(nn.Module):
    """A small MLA of parallel layers, kv_b_proj in int8; its own oracle when it does not absorb."""

    heads, n, v, latent, width = 3, 4, 5, 12, 8

    def __init__(self, absorb: str) -> None:
        super().__init__()
        self.absorb = absorb
        self.q_proj = nn.Linear(self.width, self.heads * self.n)
        self.kv_a_proj = nn.Linear(self.width, self.latent)
        rows = self.heads * (self.n + self.v)
        method = Int8ChannelLinearMethod()
        self.kv_b_proj = ReplicatedLinear(self.latent, rows, bias=False, quant_method=method)
        self.o_proj = nn.Linear(self.heads * self.v, self.width)

    def parts(self) -> tuple[Tensor, Tensor]:
        w = self.kv_b_proj.quant_method.dequantize(self.kv_b_proj)
        return parts(w, self.heads, self.n, self.v)

    def post_process(self) -> None:
        w_uk, w_uv = self.parts()
        self.w_uk, self.w_uv = w_uk.contiguous(), w_uv.transpose(1, 2).contiguous()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q = self.q_proj(x).unflatten(-1, (self.heads, self.n))
        c = torch.tanh(self.kv_a_proj(x))
        if self.absorb == "no":
            kv = self.kv_b_proj(c).unflatten(-1, (self.heads, -1))
            k, value = kv.split([self.n, self.v], -1)
            p = torch.softmax(torch.einsum("bthn,bshn->bhts", q, k), -1)
            out = torch.einsum("bhts,bshv->bthv", p, value)
        else:
            if self.absorb == "after loading":
                w_uk, w_uv = self.w_uk, self.w_uv
            else:
                w_uk, w_uv = self.parts()
                w_uv = w_uv.transpose(1, 2)
            scores = torch.einsum("bthn,hnl,bsl->bhts", q, w_uk, c)
            latents = torch.softmax(scores, -1) @ c.unsqueeze(1)
            out = torch.einsum("bhtl,hlv->bthv", latents, w_uv)
        return {"logits": self.o_proj(out.flatten(2))}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, dict]:
    """Latent without absorption, its weight dense: what the int8 weight stands for."""
    torch.manual_seed(0)
    stored = Latent("no").eval().requires_grad_(False)
    stored.kv_b_proj.load_weight("weight", torch.randn(stored.kv_b_proj.weight.shape) * 0.5)
    dense = copy.deepcopy(stored)
    dense.kv_b_proj = nn.Linear(stored.latent, stored.kv_b_proj.output_size, bias=False)
    dense.kv_b_proj.weight.data = stored.kv_b_proj.quant_method.dequantize(stored.kv_b_proj)
    folder = tmp_path_factory.mktemp("quantised")
    targets = {"a": ["kv_b_proj"], "b": ["kv_b_proj", "q_proj"], "c": ["o_proj"]}
    case = case_by_targets(dense.requires_grad_(False).eval(), folder, targets)
    return case, stored.state_dict()


@pytest.mark.parametrize("how", ["after loading", "in forward"])
def test_quantised_weights(quantised: tuple[Case, dict], how: str) -> None:
    case, state = quantised
    model = Latent(how).eval()
    model.load_state_dict(state)
    cm = lorafx.compile(model, case.folders, options=REFERENCE, dynamic=False)
    model.post_process()
    check_mixed(cm, case, NAMES, {"x": torch.randn(5, 4, model.width)})
    assert "refused" not in str(cm.explain())
