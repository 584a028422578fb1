"""Logits of mixed batches against the dense-merge oracle: one table of families, and what some of
them taught in its smallest form."""

from __future__ import annotations

import pytest
import torch
from dense_merge import build_case, check_bfloat16, check_mixed
from tiny_models import FAMILIES, VOCAB, Family, token_inputs
from torch import Tensor, nn
from transformers import (
    PatchTSTConfig,
    PatchTSTForPrediction,
    VisualBertConfig,
    VisualBertForQuestionAnswering,
)

import lorafx

pytestmark = pytest.mark.any_sizes

MIXED = ["a0", None, "a1", "a2", "a3", "a4", "a1"]


class Bagged(nn.Module):
    """Sequence first inside: time and batch change places before the sites. Where a leading size is
    a multiple of the batch, a guess by shape would be silently wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.inner(x.transpose(0, 1)))
        return {"logits": self.out(h.flatten(0, 1)).unflatten(0, h.shape[:2]).transpose(0, 1)}


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


class TiedHead(nn.Module):
    """bart, biogpt, blenderbot: a scaled embedding and a head share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = ScaledEmbedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(input_ids)))


class Siblings(nn.Module):
    """q and k of one x, whose readers depend on the memory layout of y."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)


class InChunks(Siblings):
    """longformer: overlapping chunks"""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        size, stride = (batch, length - 1, 2, 8), (length * 8, 8, 8, 1)
        q, k = (each(x).as_strided(size, stride) for each in (self.q, self.k))
        return torch.tanh(q * k).sum(2)


class ByHead(Siblings):
    """fsmt: sequence first, then (batch · heads, length, head) as a view"""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k = (each(x.transpose(0, 1)) for each in (self.q, self.k))
        q, k = (y.view(length, batch * 2, 4).permute(1, 0, 2) for y in (q, k))
        scores = q.reshape(batch, 2, length, 4) @ k.reshape(batch, 2, length, 4).mT
        return (scores @ k.reshape(batch, 2, length, 4)).permute(0, 2, 1, 3).flatten(2)


SIZES = {"num_hidden_layers": 1, "num_attention_heads": 4}


def visual_bert() -> nn.Module:
    """Images are a second argument that has requests first."""
    widths = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_labels": 3}
    return VisualBertForQuestionAnswering(
        VisualBertConfig(**widths, **SIZES, visual_embedding_dim=20)
    )


def seen(rows: int, length: int) -> dict[str, Tensor]:
    embeds = {"visual_embeds": torch.randn(rows, 4, 20)}
    return {**token_inputs(rows, length), **embeds, "visual_attention_mask": torch.ones(rows, 4)}


def series() -> nn.Module:
    """No argument is called as those of tokens or images are."""
    patches = {"context_length": 16, "patch_length": 4, "patch_stride": 4, "prediction_length": 4}
    widths = {"num_input_channels": 2, "d_model": 24, "ffn_dim": 40, "use_cls_token": True}
    return PatchTSTForPrediction(PatchTSTConfig(**patches, **widths, **SIZES))


def _small(
    build: type[nn.Module], first: list[str], other: list[str], inputs: dict[str, int]
) -> Family:
    """A module of two kinds of site, whose floating inputs have the widths of `inputs`; ids below
    11 where the width is 0."""

    def feed(rows: int, length: int) -> dict[str, Tensor]:
        return {
            name: torch.randn(rows, length, width) if width else torch.randint(11, (rows, length))
            for name, width in inputs.items()
        }

    return Family(lambda **_: build(), (first, first + other, other, first, other), feed)


#: What some families taught, in its smallest form.
SMALL = {
    "sequence first": _small(Bagged, ["inner"], ["out"], {"x": 6}),
    "scaled embedding tied to a head": _small(TiedHead, ["embed"], ["head"], {"input_ids": 0}),
    "siblings in chunks": _small(InChunks, ["q"], ["k"], {"x": 8}),
    "siblings by head": _small(ByHead, ["q"], ["k"], {"x": 8}),
}
#: Requests come in arguments of other names than tokens and images.
OTHERS = {
    "visual_bert": Family(
        lambda **_: visual_bert(),
        (["query"], "all-linear", ["dense"], "all-linear", ["value"]),
        seen,
    ),
    "patchtst": Family(
        lambda **_: series(),
        (["q_proj"], "all-linear", ["out_proj"], "all-linear", ["v_proj"]),
        lambda rows, _: {"past_values": torch.randn(rows, 16, 2)},
    ),
}
TABLE = {**FAMILIES, **SMALL, **OTHERS}
#: Batch and length of each call of one graph.
CALLS = {"sequence first": ((3, 6), (3, 3), (4, 2))}
#: Those whose graphs are for one size.
FIXED = {*OTHERS, "t5"}
#: `make test-all` has those too that differ from others of them in what no rule depends on.
ALIKE = {"bert", "gemma3", "gpt2", "phi3", "qwen3"}


@pytest.mark.parametrize(
    ("family", "fixed"),
    [
        *(
            pytest.param(name, name in FIXED, marks=[pytest.mark.slow] * (name in ALIKE))
            for name in TABLE
        ),
        pytest.param("t5", False, marks=pytest.mark.slow),
    ],
)
def test_mixed_batches(case_of, tmp_path, family, fixed):
    """Five adapters of unequal ranks and targets, base rows, padding; then another mix, batch and
    length on the same graph; then one adapter for all rows, or a batch of one."""
    torch.manual_seed(1)
    feed = TABLE[family].inputs
    case = case_of(family) if family in FAMILIES else build_case(TABLE[family], tmp_path)
    cm = case.compile(dynamic=not fixed)
    (rows, length), *others = CALLS.get(family, ((len(MIXED), 6), (4, 9)))
    check_mixed(cm, case, MIXED[:rows], feed(rows, length))
    captured = cm.recompiles
    for other in [(rows, length)] if fixed else others:
        mix = ["a3", "a1", "__base__", "a0"] if other[0] == 4 else MIXED[::-1][: other[0]]
        check_mixed(cm, case, mix, feed(*other))
    if family in SMALL:
        check_mixed(cm, case, ["a1"] * rows, feed(rows, length))
    assert cm.recompiles == captured
    if family in ("llama", "plain"):
        check_mixed(cm, case, ["a1"], feed(1, 6))


def test_tied_embeddings_with_lora_on_both_ends(case_of):
    """One weight, two sites, two deltas: an adapter of one end does not change the other."""
    case = case_of("llama", tie_word_embeddings=True)
    model = case.model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    cm = lorafx.compile(model, case.folders, options={"lowering": "reference"}, dynamic=False)
    torch.manual_seed(2)
    assert {"model.embed_tokens", "lm_head"} <= {site.path for site in cm.sites}
    check_mixed(cm, case, MIXED, token_inputs(len(MIXED), 6))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "lowering", ["reference", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_bfloat16_is_as_near_to_fp64_as_the_merged_model_in_bfloat16(tmp_path, lowering):
    def serve(base, folders, inputs, names):
        cm = lorafx.compile(base, folders, options={"lowering": lowering}, dynamic=False)
        return cm(**inputs, adapter_names=names).logits

    check_bfloat16(tmp_path, serve)
