"""What a file has of an adapter's own weights, and what it lacks: which modules get them, in which
order, and that an adapter is not served with the base's where its own are missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, error, random_base
from own_weights import own_case, save_own
from safetensors.torch import load_file, save_file
from tiny_models import token_inputs
from torch import Tensor

import lorafx
from lorafx.errors import CheckpointError

QV = ["q_proj", "v_proj"]
ONE_LAYER = {"num_hidden_layers": 1}


def inputs(rows: int) -> dict[str, Tensor]:
    torch.manual_seed(rows)
    found = token_inputs(rows, 6)
    found["input_ids"][:, 3] = 5
    return found


def edited(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return folder


@pytest.mark.parametrize("tokens", [{"lm_head": [4, 5]}, {"embed_tokens": [3, 5], "lm_head": [4]}])
def test_trained_tokens_of_a_tied_head_alone(tokens, tmp_path):
    """PEFT ties what is tied to an input embedding with trained tokens, and not the other way
    round; with different tokens for both, each has its own."""
    base = random_base("llama", **ONE_LAYER, tie_word_embeddings=True)
    config = {"target_modules": QV, "trainable_token_indices": tokens}
    case = own_case(base, tmp_path, {"tokens": config})
    x = inputs(2)
    wrapped = peft.PeftModel.from_pretrained(case.model(), str(case.folders["tokens"])).eval()
    with torch.no_grad():
        want = wrapped(**x)["logits"][0]
    got = case.compile(dynamic=False)(**x, adapter_names=["tokens", None])["logits"]
    assert error(got[0], want) <= TOLERANCE
    assert error(got[1], case.expected([None] * 2, x)[1]) <= TOLERANCE


@pytest.mark.parametrize(
    ("config", "key", "message"),
    [
        (
            {"modules_to_save": ["lm_head", "embed_tokens"]},
            "lm_head.weight",
            r"lm_head \(Linear\) has a weight of the .* the file has no lm_head\.weight",
        ),
        (
            {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}},
            "lm_head.token_adapter.trainable_tokens_delta",
            "names tokens of 'lm_head', but the file has no rows",
        ),
        (
            {"trainable_token_indices": [3]},
            "embed_tokens.token_adapter.trainable_tokens_delta",
            "names tokens, but the file has no rows",
        ),
    ],
)
def test_a_file_that_lacks_a_weight(config: Any, key: str, message: str, tmp_path):
    base = random_base("llama", **ONE_LAYER)
    folder = save_own(base, tmp_path / "a", seed=1, r=2, target_modules=QV, **config)
    lorafx.compile(base, {"a": folder}, options=REFERENCE).detach()
    edited(folder, lambda state: {k: t for k, t in state.items() if not k.endswith(key)})
    with pytest.raises(CheckpointError, match=message):
        lorafx.compile(base, {"a": folder})
