"""What is not exported is refused by name before AOTInductor runs; the model is as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case
from tiny_models import token_inputs
from torch import Tensor, nn

import lorafx

pytestmark = pytest.mark.any_sizes


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))


class Convolves(Small):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.conv(x.mT).mT)


class Breaks(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        torch._dynamo.graph_break()
        return self.up(y)


class Writes(Small):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.up(x) + self.seen


class Mixes(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.cumsum(0))


class Returns(Small):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": self.up(x), "kept": {"x": slice(3)}}


class Plain(Small):
    def forward(self, x: Tensor, scale: Any = None) -> Tensor:
        return self.up(x)


LINEAR = lorafx.LoraConfig(target_modules=["up"])


@pytest.mark.parametrize(
    ("cls", "config", "error", "match"),
    [
        (
            Convolves,
            lorafx.LoraConfig(target_modules=["up", "conv"]),
            lorafx.TargetError,
            r"conv \(Conv1d\) is not exported.*exclude_modules",
        ),
        (
            Plain,
            lorafx.LoraConfig(target_modules=["up"], use_dora=True),
            lorafx.UnsupportedAdapterError,
            "DoRA's scales",
        ),
        (
            Plain,
            lorafx.LoraConfig(target_modules=["up"], modules_to_save=["up"]),
            lorafx.UnsupportedAdapterError,
            "weights of adapters' own",
        ),
        (
            Plain,
            lorafx.LoraConfig(target_modules=["up"], slot_rank=4),
            lorafx.ConfigError,
            "slot_rank",
        ),
        (Breaks, LINEAR, lorafx.CaptureError, "runs in 2 graphs"),
        (Writes, LINEAR, lorafx.CaptureError, "writes into its arguments or buffers"),
        (Mixes, LINEAR, lorafx.ProvenanceError, "at up it is not proved.*row_dims"),
        (Returns, LINEAR, lorafx.ConfigError, "the output 'kept' 'x' is a slice"),
    ],
)
def test_models(
    cls: type[nn.Module],
    config: lorafx.LoraConfig,
    error: type[lorafx.LorafxError],
    match: str,
    tmp_path: Path,
) -> None:
    model = cls().eval()
    with pytest.raises(error, match=match):
        lorafx.export(model, config, {"x": torch.randn(2, 3, 4)}, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
    assert not model.up._forward_hooks


@pytest.mark.parametrize(
    ("inputs", "path", "match"),
    [
        ({"x": torch.randn(2, 3, 4)}, "m.bin", r"ends in \.pt2"),
        ({"x": torch.randn(1, 3, 4)}, "m.pt2", "at least two requests"),
        ({"x": torch.randn(2, 3, 4), "scale": [1]}, "m.pt2", "'scale' is a list"),
        ({"x": (x := torch.randn(2, 3, 4)), "scale": x}, "m.pt2", "are one tensor"),
        ("x", "m.pt2", "inputs are the arguments of a call"),
    ],
)
def test_arguments(inputs: Any, path: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(lorafx.ConfigError, match=match):
        lorafx.export(Plain().eval(), LINEAR, inputs, tmp_path / path)


def test_caches(case_of: Callable[..., Case], tmp_path: Path) -> None:
    llama = case_of("llama", num_hidden_layers=1)
    with pytest.raises(lorafx.ConfigError, match=r"'past_key_values' is a DynamicCache.*use_cache"):
        lorafx.export(llama.model(), None, token_inputs(2, 4), tmp_path / "m.pt2")


def test_a_compiled_model(small: Callable[..., Case], tmp_path: Path) -> None:
    compiled = lorafx.compile(Plain().eval(), LINEAR, options={"lowering": "reference"})
    with pytest.raises(lorafx.CaptureError):
        lorafx.export(compiled, LINEAR, {"x": torch.randn(2, 3, 4)}, tmp_path / "m.pt2")
