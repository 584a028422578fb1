"""Merging adapters with weights of their own: the base's weight is exchanged, and comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from dense_merge import TOLERANCE, error, random_base
from own_weights import own_case
from tiny_models import token_inputs

from lorafx.errors import MatchError

pytestmark = pytest.mark.usefixtures("fixed_sizes")

QV = ["q_proj", "v_proj"]


def check_merges(cm: Any, case: Any, *names: str) -> None:
    """Each adapter, merged, gives the model its own logits; unmerged every bit is back."""
    torch.manual_seed(0)
    x = token_inputs(2, 6)
    x["input_ids"][:, 3] = 5
    before = {key: value.clone() for key, value in cm.model.state_dict().items()}
    for name in names:
        assert cm.merge(name).error < 1e-5
        with torch.no_grad():
            got = cm.model(**x)["logits"]
        want = case.expected([name] * 2, x)
        assert error(got, want) <= TOLERANCE
        assert error(cm(**x)["logits"], want) <= TOLERANCE
        cm.unmerge()
        assert all(torch.equal(cm.model.state_dict()[key], t) for key, t in before.items())


def test_heads_embeddings_and_tokens(tmp_path):
    plans = {
        "both": {"modules_to_save": ["lm_head", "embed_tokens"]},
        "tokens": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [5, 40]}},
    }
    base = random_base("llama", num_hidden_layers=1)
    case = own_case(base, tmp_path, {n: {"target_modules": QV, **p} for n, p in plans.items()})
    cm = case.compile()
    check_merges(cm, case, "both", "tokens")
    cm.export_merged("both", tmp_path / "out")
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    x = token_inputs(2, 6)
    with torch.no_grad():
        assert error(written(**x)["logits"], case.expected(["both"] * 2, x)) <= TOLERANCE


def test_a_tied_weight(tmp_path):
    """Trained tokens of both ends are one change; another head would need a tensor of its own."""
    base = random_base("llama", num_hidden_layers=1, tie_word_embeddings=True)
    plans = {
        "tokens": {"trainable_token_indices": [3, 5]},
        "head": {"modules_to_save": ["lm_head"]},
    }
    case = own_case(base, tmp_path, {n: {"target_modules": QV, **p} for n, p in plans.items()})
    cm = case.compile()
    check_merges(cm, case, "tokens")
    with pytest.raises(MatchError, match="are one tensor, but the adapter changes only lm_head"):
        cm.merge("head")
