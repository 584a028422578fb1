"""Vocabulary layers are nn.Embedding and nn.Linear; FusedMoE is the sum over chosen experts."""

import copy
import json

import oracle
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import lorafx
from lorafx.layers import FusedMoE, VocabParallelEmbedding, load_weights

E, K, H, I = 5, 2, 6, 8  # noqa: E741


def test_embedding():
    layer = VocabParallelEmbedding(11, 4)
    ids = torch.randint(0, 11, (3, 5))
    assert torch.equal(layer(ids), F.embedding(ids, layer.weight))
    assert (layer.num_embeddings, layer.embedding_dim, layer.tp_size) == (11, 4, 1)
    table = torch.randn(11, 4)
    layer.load_weight("weight", table)
    assert torch.equal(layer(ids), table[ids])
    with pytest.raises(lorafx.CheckpointError, match=r"\(12, 4\), expected \(11, 4\)"):
        layer.load_weight("weight", torch.zeros(12, 4))


def by_experts(x, logits, w13, w2, renormalize):
    """One token and one expert at a time."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        p = logits[t].softmax(-1)
        chosen = p.argsort(descending=True)[:K]
        total = p[chosen].sum() if renormalize else 1
        for e in chosen.tolist():
            gate, up = (x[t] @ w13[e].T).chunk(2)
            out[t] += p[e] / total * ((F.silu(gate) * up) @ w2[e].T)
    return out


@pytest.mark.parametrize("renormalize", [True, False])
def test_experts(renormalize):
    layer = FusedMoE(E, K, H, I, renormalize=renormalize)
    x, logits = torch.randn(2, 3, H), torch.randn(2, 3, E)
    y = layer(x, logits)
    want = by_experts(
        x.flatten(0, 1), logits.flatten(0, 1), layer.w13_weight, layer.w2_weight, renormalize
    )
    torch.testing.assert_close(y, want.view_as(x))
    captured = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(captured(x, logits), y)


def test_experts_are_loaded_one_by_one_or_as_one_tensor():
    w13, w2 = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
    whole, single = FusedMoE(E, K, H, I), FusedMoE(E, K, H, I)
    whole.load_weight("w13_weight", w13)
    whole.load_weight("w2_weight", w2)
    model = nn.Module()
    model.experts = single
    saved = {}
    for e in range(E):
        saved[f"experts.{e}.gate_proj.weight"], saved[f"experts.{e}.up_proj.weight"] = w13[e].split(
            I
        )
        saved[f"experts.{e}.down_proj.weight"] = w2[e]
    loaded = load_weights(model, saved)
    assert loaded == {"experts.w13_weight", "experts.w2_weight"}
    for name in ("w13_weight", "w2_weight"):
        assert torch.equal(getattr(single, name), getattr(whole, name))
    assert torch.equal(whole.w13_weight, w13)

    del saved["experts.3.up_proj.weight"]
    with pytest.raises(lorafx.CheckpointError, match=r"experts\.w13_weight.*slices \('w3', 3\)"):
        load_weights(model, saved)
    with pytest.raises(lorafx.CheckpointError, match=r"no shard id \('w2', 0\) of w13_weight"):
        single.load_weight("w13_weight", w2[0], ("w2", 0))
    with pytest.raises(lorafx.CheckpointError, match=r"experts 0 to 4"):
        single.load_weight("w2_weight", w2[0], ("w2", 5))
    with pytest.raises(lorafx.CheckpointError, match=r"\('w2', 0\).*\(8, 6\), expected \(6, 8\)"):
        single.load_weight("w2_weight", w2[0].T, ("w2", 0))


class Block(nn.Module):
    """A router and its experts."""

    def __init__(self, router=lorafx.layers.ReplicatedLinear) -> None:
        super().__init__()
        self.gate = router(H, E, bias=False)
        self.experts = FusedMoE(E, K, H, I)

    def forward(self, x):
        return self.experts(x, self.gate(x))


def test_experts_carry_lora(tmp_path):
    """An adapter with factors for each projection of some experts, in a mixed batch."""
    torch.manual_seed(0)
    block = Block().eval().requires_grad_(False)
    base, merged = copy.deepcopy(block), copy.deepcopy(block)
    tensors = {}
    for expert in (0, 3):
        for name, rows, width in (("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)):
            a, b = torch.randn(2, width), torch.randn(rows, 2)
            key = f"base_model.model.experts.{expert}.{name}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            if name == "down_proj":
                merged.experts.w2_weight[expert] += b @ a
            else:
                start = I if name == "up_proj" else 0
                merged.experts.w13_weight[expert, start : start + I] += b @ a
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    names = ["gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": names}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    cm = lorafx.compile(block, {"a": tmp_path}, options={"lowering": "reference"})
    assert [site.path for site in cm.sites] == ["experts.w13_weight", "experts.w2_weight"]
    x, rows = torch.randn(3, 4, H), ["a", None, "a"]
    want = [(merged if row else base)(x[i : i + 1]) for i, row in enumerate(rows)]
    oracle.assert_close(cm(x, adapter_names=rows), [torch.cat(want)])
    assert oracle.difference([base(x)], [torch.cat(want)]) > 1e-2
