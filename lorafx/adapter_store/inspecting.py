"""What an adapter holds, without a model: for `lorafx inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.dialects import mlx
from lorafx.adapter_store.peft_config import PeftConfig, is_off, raw_fields
from lorafx.adapter_store.peft_keys import FactorSizes, factor_sizes, parse, without_prefix
from lorafx.adapter_store.saved import AdapterState


@dataclass(frozen=True)
class Row:
    """A module's factors: their sizes, and s if known."""

    path: str
    sizes: FactorSizes
    scale: float | None


@dataclass(frozen=True)
class Inspected:
    """Modules with factors, features beyond plain factors, and other keys of an adapter."""

    where: str
    dialect: str
    tensors: int
    nbytes: int
    modules: tuple[Row, ...]
    features: tuple[str, ...]
    others: tuple[str, ...]
    base: str | None

    def lines(self) -> Iterator[str]:
        """The report without `modules`."""
        yield f"dialect: {self.dialect}"
        yield f"{self.tensors} tensors, {self.nbytes} bytes"
        if self.modules:
            ranks = sorted({row.sizes.rank for row in self.modules})
            yield f"{len(self.modules)} modules, rank {', '.join(map(str, ranks))}"
        if self.base:
            yield f"trained for {self.base}"
        yield from (f"feature: {feature}" for feature in self.features)
        yield from (f"not a LoRA factor: {key}" for key in self.others)


def inspected(source: Any) -> Inspected:
    """The contents of an adapter; raises as `load_state`."""
    state = load_state(source)
    config, scales, tensors = state.config, state.scales, state.tensors
    rows = [
        Row(path, sizes, scales.get(path, config.scale(path, sizes.rank) if sizes.rank else None))
        for saved, sizes in factor_sizes(tensors).items()
        for path in (without_prefix(saved),)
    ]
    return Inspected(
        state.where,
        state.dialect,
        len(tensors),
        sum(tensor.nbytes for tensor in tensors.values()),
        tuple(sorted(rows, key=lambda row: row.path)),
        tuple(_features(state)),
        tuple(key for key in tensors if parse(key) is None),
        config.base_model,
    )


def config_of(folder: Path) -> PeftConfig:
    """A folder's configuration in PEFT's terms; PEFT's tensors are not read."""
    fields, where = raw_fields(folder)
    if not mlx.configures(fields):
        return PeftConfig.read(fields, where=where)
    state = load_state(folder)
    ranks = [sizes.rank for sizes in factor_sizes(state.tensors).values() if sizes.rank]
    return replace(state.config, r=max(ranks, default=None))


#: What fields of a configuration mean where they are set.
_FEATURES = {
    "invocation": "aLoRA: active from the tokens [{}] on",
    "use_dora": "DoRA: outputs are rescaled (use_dora)",
    "lora_bias": "biases of B (lora_bias)",
    "use_rslora": "s = α/√r (use_rslora)",
    "rank_pattern": "ranks of single modules (rank_pattern)",
    "alpha_pattern": "α of single modules (alpha_pattern)",
    "target_parameters": "parameters: {} (target_parameters)",
    "modules_to_save": "whole weights: {} (modules_to_save)",
    "trainable_token_indices": "tokens of its own: {} (trainable_token_indices)",
}


def _features(state: AdapterState) -> Iterator[str]:
    for name, text in _FEATURES.items():
        value = getattr(state.config, name)
        if not is_off(value):
            yield text.format(", ".join(map(str, value)) if isinstance(value, tuple) else value)
    if state.config.bias != "none":
        yield f"biases of its own (bias = {state.config.bias})"
    if any((factor := parse(key)) and factor.embedding for key in state.tensors):
        yield "factors of embeddings"
