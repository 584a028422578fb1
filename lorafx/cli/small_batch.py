"""A small mixed batch by this machine's own lowering, and what it ought to be.

y[b] = f(x[b]; W + s·B A of names[b])    for two adapters and the base, each row alone
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lorafx
from lorafx.torch_internals import versions

#: Largest difference in float32, relative to the largest of 1 and the expected magnitude.
TOLERANCE = 1e-5
_NAMES = ("first", None, "second")
_RANKS = {"first": 4, "second": 2}
_SCALE = 2.0
#: A and B by the path of a linear.
_Factors = Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True)
class SmallBatch:
    """The class of the model, the device, the largest relative difference from dense merge, and the
    seconds with compiling."""

    model: str
    device: str
    difference: float
    seconds: float

    @property
    def right(self) -> bool:
        return self.difference <= TOLERANCE  # NaN is not

    def __str__(self) -> str:
        return (
            f"{self.model} on {self.device}, two adapters and the base: largest difference from "
            f"dense merge {self.difference:.1e}, {self.seconds:.1f} s with compiling"
        )


def run_small_batch() -> SmallBatch:
    """Compile the model and its adapters, and compare one batch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = _model().to(device).eval()
        ids = torch.randint(3, 61, (len(_NAMES), 5), device=device)
        factors = {name: _factors(model, rank) for name, rank in _RANKS.items()}
        alone = [_merged(model, factors.get(name or "", {})) for name in _NAMES]
        rows = [_logits(merged(ids[row : row + 1])) for row, merged in enumerate(alone)]
        start = time.perf_counter()
        adapters = {name: _source(of_name, _RANKS[name]) for name, of_name in factors.items()}
        got = _logits(lorafx.compile(model, adapters)(ids, adapter_names=list(_NAMES)))
        seconds, want = time.perf_counter() - start, torch.cat(rows)
        difference = float((got - want).abs().max() / want.abs().max().clamp(min=1))
    return SmallBatch(type(model).__name__, device, difference, seconds)


def _model() -> Any:
    """A Llama of one layer; without transformers a few layers of torch's."""
    from torch import nn

    if versions.installed("transformers") is None:
        layers = (nn.Embedding(61, 24), nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 61))
        return nn.Sequential(*layers)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        vocab_size=61,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def _factors(model: Any, rank: int) -> _Factors:
    import torch

    def random(rows: int, columns: int) -> Any:
        return (torch.randn(rows, columns) / columns**0.5).to(next(model.parameters()))

    linears = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {
        path: (random(rank, linear.in_features), random(linear.out_features, rank))
        for path, linear in linears.items()
    }


def _source(factors: _Factors, rank: int) -> Any:
    tensors = {
        f"base_model.model.{path}.lora_{which}.weight": factor.cpu()
        for path, pair in factors.items()
        for which, factor in zip("AB", pair, strict=True)
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": _SCALE * rank}
    return lorafx.AdapterSource(tensors, {**config, "target_modules": list(factors)})


def _merged(model: Any, factors: _Factors) -> Any:
    merged = copy.deepcopy(model)
    for path, (a, b) in factors.items():
        merged.get_submodule(path).weight += _SCALE * b @ a
    return merged


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)
