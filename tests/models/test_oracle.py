"""Logits of mixed batches against the dense-merge oracle, family by family."""

from __future__ import annotations

import pytest
import torch
from dense_merge import build_case, check_bfloat16, check_mixed
from tiny_models import FAMILIES, Family, token_inputs

import lorafx

MIXED = ["a0", None, "a1", "a2", "a3", "a4", "a1"]


#: `make test-all` has those too that differ from others of them in what no rule depends on.
ALIKE = {"bert", "gemma3", "phi3", "qwen3"}


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in FAMILIES],
)
def test_mixed_batches(case_of, family):
    """Five adapters of unequal ranks and targets, base rows, padding; then another mix, batch
    and length on the same graph; then a batch of one."""
    torch.manual_seed(1)
    case, feed = case_of(family), FAMILIES[family].inputs
    cm = case.compile()
    check_mixed(cm, case, MIXED, feed(len(MIXED), 6))
    captured = cm.recompiles
    check_mixed(cm, case, ["a3", "a1", "__base__", "a0"], feed(4, 9))
    assert cm.recompiles == captured
    if family in ("llama", "gpt2", "plain"):
        check_mixed(cm, case, ["a1"], feed(1, 6))


def test_tied_embeddings_with_lora_on_both_ends(case_of):
    """One weight, two sites, two deltas: an adapter of one end does not change the other."""
    case = case_of("llama", num_hidden_layers=1, tie_word_embeddings=True)
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


class Bagged(torch.nn.Module):
    """Sequence first inside: time and batch change places before the sites."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(6, 9)
        self.out = torch.nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = torch.tanh(self.inner(x.transpose(0, 1)))
        return {"logits": self.out(h.flatten(0, 1)).unflatten(0, h.shape[:2]).transpose(0, 1)}


def test_sequence_first_layouts(tmp_path):
    """Where a leading size is a multiple of the batch, a guess by shape would be silently wrong."""
    family = Family(
        lambda **_: Bagged(),
        (["inner"], ["inner", "out"], ["out"], ["inner"], ["out"]),
        lambda rows, length: {"x": torch.randn(rows, length, 6)},
    )
    case = build_case(family, tmp_path)
    cm = case.compile()
    torch.manual_seed(4)
    for rows, length in ((3, 6), (3, 3), (4, 2)):
        check_mixed(cm, case, ["a1", None, "a0", "a2"][:rows], family.inputs(rows, length))
