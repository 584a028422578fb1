"""Weights of adapters' own where they are stored transposed, used outside of their module's call,
shared by all requests, or used in a way in which another weight cannot stand in for the base's; and
what a file has of them, and lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error, random_base
from own_weights import own_case, save_own
from safetensors.torch import load_file, save_file
from tiny import randomise
from tiny_models import token_inputs
from torch import Tensor, nn

import lorafx
from lorafx.errors import CheckpointError, MatchError

K, N, V = 6, 8, 11


def inputs(rows: int) -> dict[str, Tensor]:
    torch.manual_seed(rows)
    found = token_inputs(rows, 6)
    found["input_ids"][:, 3] = 5
    return found


def test_a_transposed_weight_and_positions(tmp_path):
    """GPT-2: a Conv1D, and an embedding of positions, which all requests share."""
    base = random_base("gpt2", n_layer=1)
    plans = {
        "conv": {"modules_to_save": ["c_fc"]},
        "positions": {"modules_to_save": ["wpe"]},
        "tokens": {"trainable_token_indices": {"wte": [5, 7]}},
    }
    fixed = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    case = own_case(base, tmp_path, {name: {**fixed, **plan} for name, plan in plans.items()})
    check_mixed(case.compile(), case, ["conv", None, "positions", "tokens"], inputs(4))


class Offset(nn.Linear):
    """Adds more than its bias."""

    def __init__(self) -> None:
        super().__init__(K, N)
        self.register_buffer("offset", torch.randn(N), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset


class Scaled(nn.Linear):
    """y = (W x + b) / 2: the use of the weight is found, and its bias is its own."""

    def __init__(self) -> None:
        super().__init__(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Model(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, K)
        self.first = nn.Linear(K, K)
        self.head = kind()

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.relu(self.first(self.embed(ids))))}


class Bypassed(Model):
    """Uses the weight of its head without calling it."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Linear(K, N))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.first(self.embed(ids)))
        return {"logits": F.linear(x, self.head.weight, self.head.bias)}


class Biasless(Bypassed):
    """Leaves the bias of its head out."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.first(self.embed(ids)))
        return {"logits": F.linear(x, self.head.weight)}


class Broken(Bypassed):
    """Reads it in another graph."""

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        y = self.head(torch.relu(self.first(self.embed(ids))))
        torch._dynamo.graph_break()
        return {"logits": y * (1 + self.head.bias)}


def built(model: nn.Module) -> nn.Module:
    randomise(model.eval().requires_grad_(False))
    return model


def saved_case(base: nn.Module, folder: Path) -> Case:
    """PEFT itself cannot merge where its wrapper is not called: the oracle is made by hand."""
    folders = {
        "own": save_own(base, folder / "own", seed=1, r=2, **_plan(["head"])),
        "plain": save_own(base, folder / "plain", seed=2, r=2, **_plan(None)),
    }
    return Case(base, folders)


def _plan(saved: list[str] | None) -> dict[str, Any]:
    return {"target_modules": ["first"], "modules_to_save": saved}


@pytest.mark.parametrize("make", [lambda: Model(Scaled), Bypassed])
def test_uses_that_are_found(make, tmp_path):
    torch.manual_seed(0)
    case = saved_case(built(make()), tmp_path)
    ids = torch.randint(V, (3, 4))
    check_mixed(case.compile(), case, ["own", None, "plain"], {"ids": ids})


@pytest.mark.parametrize("make", [lambda: Model(Offset), Biasless, Broken])
def test_other_arithmetic_is_refused_and_other_adapters_are_served(make, tmp_path):
    torch.manual_seed(0)
    case = saved_case(built(make()), tmp_path)
    cm, ids = case.compile(), torch.randint(V, (3, 4))
    with pytest.raises(MatchError, match="an adapter has of its own for head cannot be applied"):
        cm(ids=ids, adapter_names=["own", None, "plain"])
    check_mixed(cm, case, ["plain", None, "plain"], {"ids": ids})


QV = ["q_proj", "v_proj"]


def edited(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return folder


@pytest.mark.parametrize("tokens", [{"lm_head": [4, 5]}, {"embed_tokens": [3, 5], "lm_head": [4]}])
def test_trained_tokens_of_a_tied_head_alone(tokens, tmp_path):
    """PEFT ties what is tied to an input embedding with trained tokens, and not the other way
    round; with different tokens for both, each has its own."""
    base = random_base("llama", tie_word_embeddings=True)
    config = {"target_modules": QV, "trainable_token_indices": tokens}
    case = own_case(base, tmp_path, {"tokens": config})
    x = inputs(2)
    wrapped = peft.PeftModel.from_pretrained(case.model(), str(case.folders["tokens"])).eval()
    with torch.no_grad():
        want = wrapped(**x)["logits"][0]
    got = case.compile()(**x, adapter_names=["tokens", None])["logits"]
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
    base = random_base("llama")
    folder = save_own(base, tmp_path / "a", seed=1, r=2, target_modules=QV, **config)
    lorafx.compile(base, {"a": folder}, options=REFERENCE).detach()
    edited(folder, lambda state: {k: t for k, t in state.items() if not k.endswith(key)})
    with pytest.raises(CheckpointError, match=message):
        lorafx.compile(base, {"a": folder})
