"""What is made of a base weight after loading: absorbed MLA, weights used by groups, metadata.

The oracle of absorbed attention is the model that does not absorb: transformers' DeepseekV3 with
W + ΔW merged into `kv_b_proj`, each row alone.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from absorbed import (
    KEPT,
    PRODUCTS,
    AbsorbedAttention,
    AbsorbedInForward,
    absorb,
    parts,
    post_process,
)
from dense_merge import Case, check_mixed, error, random_base, save_adapter
from tiny_models import VOCAB, Family
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

import lorafx
from lorafx.errors import MatchError
from lorafx.layers import ReplicatedLinear
from lorafx.layers.quantization import Int8ChannelLinearMethod

NAMES = ["a", None, "b", "a", "c"]
REFERENCE = {"lowering": "reference"}


def config(**changes: object) -> transformers.DeepseekV3Config:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "q_lora_rank": 10,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
        "use_cache": False,
        **changes,
    }
    return transformers.DeepseekV3Config(**sizes)


def deepseek() -> nn.Module:
    return transformers.DeepseekV3ForCausalLM(config())


class OneLayer(nn.Module):
    """The attention of DeepSeek-V3 alone, causal."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.rotary = DeepseekV3RotaryEmbedding(config(**changes))
        self.self_attn = DeepseekV3Attention(config(**changes), 0)

    def forward(self, inputs_embeds: Tensor) -> dict[str, Tensor]:
        length = inputs_embeds.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), -1e9).triu(1)[None, None]
        rotary = self.rotary(inputs_embeds, positions)
        return {"logits": self.self_attn(inputs_embeds, rotary, mask)[0]}


def case_of(build, folder) -> Case:
    """Adapter c does not touch kv_b_proj."""
    base = random_base(Family(build, ()))
    targets = {"a": ["kv_b_proj"], "b": ["kv_b_proj", "q_b_proj", "o_proj"], "c": ["o_proj"]}
    folders = {
        name: save_adapter(base, folder / name, rank=rank, targets=paths, seed=rank)
        for rank, (name, paths) in enumerate(targets.items(), 2)
    }
    return Case(base, folders)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One attention as transformers computes it."""
    return case_of(OneLayer, tmp_path_factory.mktemp("layer"))


def states(rows: int, length: int) -> dict[str, Tensor]:
    return {"inputs_embeds": torch.randn(rows, length, 24)}


def absorbed(case: Case, cls: type[nn.Module] = AbsorbedAttention, product: str = "bmm"):
    model = case.model()
    absorb(model, cls, product)
    return model


def test_absorbed_attention_is_the_attention(layer: Case) -> None:
    model = absorbed(layer)
    post_process(model)
    inputs = states(2, 5)
    with torch.no_grad():
        assert error(model(**inputs)["logits"], layer.base(**inputs)["logits"]) <= 1e-5


@pytest.mark.parametrize(
    ("kept", "product"),
    [
        ("views", "bmm"),
        ("permuted views", "einsum"),
        ("copies", "heads apart"),
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


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("kept", KEPT)
def test_each_way_to_keep_by_each_way_to_multiply(layer: Case, kept: str, product: str) -> None:
    test_absorbed_weights_carry_the_delta(layer, kept, product)


@pytest.mark.parametrize(
    "product",
    ["matmul", *(pytest.param(p, marks=pytest.mark.slow) for p in PRODUCTS if p != "matmul")],
)
def test_absorbed_in_every_forward(layer: Case, product: str) -> None:
    model = absorbed(layer, AbsorbedInForward, product)
    cm = lorafx.compile(model, layer.folders, options=REFERENCE)
    check_mixed(cm, layer, NAMES, states(5, 4))


@pytest.mark.slow
def test_a_whole_model(tmp_path) -> None:
    """DeepSeek-V3, absorbed before it is compiled: its parts stay where they are."""
    case = case_of(deepseek, tmp_path)
    model = absorbed(case, product="einsum")
    post_process(model, "views")
    attentions = [m for m in model.modules() if isinstance(m, AbsorbedAttention)]
    parts_before = [(m.w_uk, m.w_uk.data_ptr()) for m in attentions]
    cm = lorafx.compile(model, case.folders, options={**REFERENCE, "verify": "numeric"})
    check_mixed(cm, case, NAMES, {"input_ids": torch.randint(3, VOCAB, (5, 4))})
    for module, (part, pointer) in zip(attentions, parts_before, strict=True):
        assert module.w_uk is part
        assert part.data_ptr() == pointer
        assert part.untyped_storage()._cdata == module.kv_b_proj.weight.untyped_storage()._cdata


@pytest.mark.slow
def test_absorbed_by_inductor(layer: Case) -> None:
    model = absorbed(layer)
    cm = lorafx.compile(model, layer.folders, options={"lowering": "inductor"})
    post_process(model)
    check_mixed(cm, layer, NAMES, states(5, 4))


def test_absorbed_with_a_slot_a_token(layer: Case) -> None:
    model = absorbed(layer)
    cm = lorafx.compile(model, layer.folders, options=REFERENCE)
    post_process(model)
    inputs = states(2, 4)
    slots = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    got = cm(**inputs, adapter_names=["a", "b"], adapter_slots=slots)["logits"]
    # The first tokens attend to none of the later ones: they are what one adapter a row gives.
    want = layer.expected(["b", "a"], inputs)
    assert error(got[:, :2], want[:, :2]) <= 1e-5
    assert error(got[:, 2:], want[:, 2:]) > 1e-3


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
    with pytest.raises(MatchError, match=r"the weight of self_attn\.kv_b_proj is not what it was"):
        cm(**inputs, adapter_names=["a", "b"])
    with torch.no_grad():
        base = model(**inputs)["logits"]
    assert error(cm(**inputs, adapter_names=["c", None])["logits"][1], base[1]) <= 1e-5


class TwoLayers(nn.Module):
    """Two attentions, each in graphs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([OneLayer(), OneLayer()])

    def forward(self, inputs_embeds: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            inputs_embeds = inputs_embeds + layer(inputs_embeds)["logits"]
            torch._dynamo.graph_break()
        return {"logits": inputs_embeds}


@pytest.mark.parametrize("kept", [pytest.param("views", marks=pytest.mark.slow), "copies"])
def test_layers_that_share_a_graph_have_parts_of_their_own(tmp_path, kept: str) -> None:
    case = case_of(TwoLayers, tmp_path)
    model = absorbed(case)
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    post_process(model, kept)
    for name in case.folders:
        check_mixed(cm, case, [name] * 3, states(3, 4))
    assert cm.recompiles == 1


def test_under_torch_compile(layer: Case) -> None:
    """Marked models that their users compile, the second one on the first one's graph. Only
    kv_b_proj is a site, so that no mark stands in the graph."""
    for kept in ("copies", "copies"):
        model = lorafx.attach(
            absorbed(layer), adapters={"a": layer.folders["a"]}, options=REFERENCE
        )
        post_process(model, kept)
        compiled = torch.compile(model, backend="lorafx", dynamic=True)
        inputs = states(3, 4)
        with torch.no_grad():
            assert error(compiled(**inputs)["logits"], layer.base(**inputs)["logits"]) <= 1e-5
            with lorafx.adapters(model, ["a", None, "a"]):
                got = compiled(**inputs)["logits"]
        assert error(got, layer.expected(["a", None, "a"], inputs)) <= 1e-5
        lorafx.detach(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_parts_of_a_weight_that_has_siblings(tmp_path, when: str) -> None:
    """q_b_proj and kv_b_proj have equal inputs, so their weights could be packed in one buffer."""
    case = case_of(lambda: OneLayer(q_lora_rank=14), tmp_path)
    model = absorbed(case)
    attention = model.self_attn
    if when == "before":
        post_process(model)
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    if when == "after":
        post_process(model)
    storages = {t.untyped_storage()._cdata for t in (attention.w_uk, attention.kv_b_proj.weight)}
    assert len(storages) == 1
    check_mixed(cm, case, NAMES, states(5, 4))


# What is refused: never dropped


def _scaled(attention: nn.Module) -> None:
    attention.w_uk = attention.w_uk * 0.25


def _rounded(attention: nn.Module) -> None:
    attention.w_uv = attention.w_uv.bfloat16().float()


def _shuffled(attention: nn.Module) -> None:
    order = torch.tensor([2, 0, 1])
    attention.w_uk, attention.w_uv = attention.w_uk[order], attention.w_uv[order]


def _slanted(attention: nn.Module) -> None:
    """A view that is no regular part of the weight."""
    w = attention.kv_b_proj.weight.detach()
    attention.w_uk = w.as_strided(attention.w_uk.shape, (w.shape[1], w.shape[1] + 1, 1))


@pytest.mark.parametrize(
    "change",
    [_scaled, _slanted, *(pytest.param(c, marks=pytest.mark.slow) for c in (_rounded, _shuffled))],
)
def test_parts_that_no_rule_follows_are_refused_by_name(layer: Case, change) -> None:
    model = absorbed(layer)
    cm = lorafx.compile(model, layer.folders, options=REFERENCE)
    post_process(model, "copies")
    change(model.self_attn)
    inputs = states(3, 4)
    refusal = (
        r"cannot be applied at self_attn\.kv_b_proj: its weight is used in a way no rule knows"
    )
    with pytest.raises(MatchError, match=refusal) as caught:
        cm(**inputs, adapter_names=["a", None, "b"])
    assert "exclude_modules" in str(caught.value)
    with torch.no_grad():
        base = model(**inputs)["logits"]
    assert error(cm(**inputs, adapter_names=["c", None, "c"])["logits"][1], base[1]) <= 1e-5


class Folded(AbsorbedAttention):
    """A gain of the latents is folded into W_UK and W_UV, which hold no row of the weight then."""

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.w_uk, self.w_uv

    def fold(self) -> None:
        gain = torch.rand(self.kv_lora_rank) * 4 + 0.25
        self.w_uk, self.w_uv = self.w_uk / gain, self.w_uv / gain
        self.kv_a_layernorm.weight.data = self.kv_a_layernorm.weight * gain


def test_parts_of_another_make_are_refused_where_nothing_uses_the_weight(layer: Case) -> None:
    model = absorbed(layer, Folded)
    cm = lorafx.compile(model, layer.folders, options=REFERENCE)
    post_process(model)
    model.self_attn.fold()
    inputs = states(3, 4)
    with pytest.raises(MatchError, match="nothing uses its weight, and self_attn computes with"):
        cm(**inputs, adapter_names=["a", None, "c"])
    check_mixed(cm, layer, ["c", None, "c"], inputs)


def test_excluded_projections_absorb_freely(layer: Case) -> None:
    model = absorbed(layer)
    chosen = lorafx.LoraConfig(target_modules=["o_proj"])
    cm = lorafx.compile(model, chosen, adapters={"c": layer.folders["c"]}, options=REFERENCE)
    post_process(model, "copies")
    check_mixed(cm, layer, ["c", None, "c"], states(3, 4))


# Quantised weights


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
    stored.kv_b_proj.weight.weight_loader(
        stored.kv_b_proj.weight, torch.randn(stored.kv_b_proj.weight.shape) * 0.5
    )
    dense = copy.deepcopy(stored)
    dense.kv_b_proj = nn.Linear(stored.latent, stored.kv_b_proj.output_size, bias=False)
    dense.kv_b_proj.weight.data = stored.kv_b_proj.quant_method.dequantize(stored.kv_b_proj)
    folder = tmp_path_factory.mktemp("quantised")
    folders = {
        name: save_adapter(dense, folder / name, rank=rank, targets=targets, seed=rank)
        for name, rank, targets in (
            ("a", 2, ["kv_b_proj"]),
            ("b", 3, ["kv_b_proj", "q_proj"]),
            ("c", 4, ["o_proj"]),
        )
    }
    return Case(dense.requires_grad_(False).eval(), folders), stored.state_dict()


@pytest.mark.parametrize("how", ["no", "after loading", "in forward"])
def test_quantised_weights(quantised: tuple[Case, dict], how: str) -> None:
    case, state = quantised
    model = Latent(how).eval()
    model.load_state_dict(state)
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    model.post_process()
    check_mixed(cm, case, NAMES, {"x": torch.randn(5, 4, model.width)})
    assert "refused" not in str(cm.explain())


class Opaque(Int8ChannelLinearMethod):
    """A format that cannot be read back."""

    dequantize = None  # type: ignore[assignment]


def test_weights_that_cannot_be_read_are_refused_when_something_stands_in(
    quantised: tuple[Case, dict],
) -> None:
    case, state = quantised
    model = Latent("after loading").eval()
    model.load_state_dict(state)
    model.post_process()
    model.kv_b_proj.quant_method = Opaque()
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    inputs = {"x": torch.randn(3, 4, model.width)}
    with pytest.raises(MatchError, match="kv_b_proj: nothing uses its weight, and the model"):
        cm(**inputs, adapter_names=["a", None, "b"])
    check_mixed(cm, case, ["c", None, "c"], inputs)


# Weights by groups


class Grouped(nn.Module):
    """DeepSeek-V4's grouped output projection between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 3 * 8)
        self.o_a_proj = DeepseekV4GroupedLinear(8, 3 * 5, n_groups=3)
        self.o_b_proj = nn.Linear(3 * 5, 7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        grouped = torch.tanh(self.up(x)).unflatten(-1, (3, 8))
        return {"logits": self.o_b_proj(self.o_a_proj(grouped).flatten(2))}


@pytest.mark.parametrize("lowering", ["reference", "inductor"])
def test_grouped_linear_of_transformers(small, lowering: str) -> None:
    case = small(Grouped, ["o_a_proj"], ["o_a_proj", "o_b_proj", "up"])
    cm = case.compile(options={"lowering": lowering})
    check_mixed(cm, case, ["a", None, "b", "a"], {"x": torch.randn(4, 3, 6)})
    check_mixed(cm, case, ["b", "a"], {"x": torch.randn(2, 5, 6)})
    forms = {state.site.path: state.form for state in cm._session.backend.records[-1].states}
    assert forms["o_a_proj"] == "rewritten"


# Metadata


def snapshot(model: nn.Module) -> dict[str, object]:
    """What code may look at, by identity: every attribute of every module, and its class."""
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        found[f"{path}:class"] = module.__class__
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                for key, held in value.items():
                    found[f"{path}:{key}"] = held
            elif not name.startswith("_forward_hooks"):
                found[f"{path}.{name}"] = value
    return found


@pytest.mark.parametrize("build", [lambda: Latent("no"), deepseek], ids=["int8", "DeepSeek-V3"])
def test_everything_that_code_may_look_at_is_the_same(build) -> None:
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    for module in model.modules():
        module.marked_by_me = object()
    before = snapshot(model)
    keys = list(model.state_dict())
    cm = lorafx.compile(model, lorafx.LoraConfig(), options=REFERENCE)

    def check() -> None:
        after = snapshot(model)
        assert after.keys() == before.keys()
        assert [key for key in before if after[key] is not before[key]] == []
        assert list(model.state_dict()) == keys

    check()
    site = next(m for path, m in model.named_modules() if path.endswith("kv_b_proj"))
    assert isinstance(site, (nn.Linear, ReplicatedLinear))
    if isinstance(site, ReplicatedLinear):
        assert site.weight.dtype is torch.int8
        assert site.weight_scale.shape == site.weight.shape[:1]
        assert isinstance(site.quant_method, Int8ChannelLinearMethod)
    else:
        assert site.in_features == site.weight.shape[1]
    cm.detach()
    check()
