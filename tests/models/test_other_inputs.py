"""Models of transformers whose requests come in arguments of other names than tokens and images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from dense_merge import TOLERANCE, Case, error, random_base, save_adapter
from tiny_models import VOCAB, Family, token_inputs
from torch import Tensor, nn
from transformers import (
    PatchTSTConfig,
    PatchTSTForPrediction,
    VisualBertConfig,
    VisualBertForQuestionAnswering,
)


def visual_bert() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_labels": 3}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4}
    return VisualBertForQuestionAnswering(
        VisualBertConfig(**sizes, **layers, visual_embedding_dim=20)
    )


def seen(rows: int) -> dict[str, Tensor]:
    embeds = {"visual_embeds": torch.randn(rows, 4, 20)}
    return {**token_inputs(rows, 6), **embeds, "visual_attention_mask": torch.ones(rows, 4)}


def series() -> nn.Module:
    patches = {"context_length": 16, "patch_length": 4, "patch_stride": 4, "prediction_length": 4}
    sizes = {"num_input_channels": 2, "d_model": 24, "ffn_dim": 40, "use_cls_token": True}
    return PatchTSTForPrediction(
        PatchTSTConfig(**patches, **sizes, num_hidden_layers=1, num_attention_heads=4)
    )


def values(rows: int) -> dict[str, Tensor]:
    return {"past_values": torch.randn(rows, 16, 2)}


@pytest.mark.parametrize(
    ("build", "inputs", "result"),
    [
        (visual_bert, seen, "logits"),
        (series, values, "prediction_outputs"),
    ],
)
def test_requests_are_known(
    build: Callable[[], nn.Module],
    inputs: Callable[[int], dict[str, Tensor]],
    result: str,
    tmp_path: Path,
) -> None:
    base = random_base(Family(lambda **_: build(), ()))
    folders = {
        name: save_adapter(base, tmp_path / name, rank=rank, targets="all-linear", seed=rank)
        for name, rank in (("a", 2), ("b", 3))
    }
    case, names = Case(base, folders), ["a", None, "b"]
    x = inputs(3)
    got = case.compile(dynamic=False)(**x, adapter_names=names)[result]
    for row, name in enumerate(names):
        own = oracle.one_row(x, row)
        with torch.no_grad():
            want, plain = case.alone(name)(**own)[result], base(**own)[result]
        assert error(got[row : row + 1], want) <= TOLERANCE
        assert (name is None) == (error(want, plain) <= 100 * TOLERANCE)
