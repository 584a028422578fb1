"""What an adapter holds, without a model: for `lorafx inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.dialects import mlx
from lorafx.adapter_store.peft_config import PeftConfig, raw_fields
from lorafx.adapter_store.peft_keys import FactorSizes, factor_sizes, parse, without_prefix
from lorafx.adapter_store.saved import AdapterSource, AdapterState, opened
from lorafx.errors import UnsupportedAdapterError


@dataclass(frozen=True)
class Row:
    """A module's factors: their sizes, and s if known."""

    path: str
    sizes: FactorSizes
    scale: float | None


@dataclass(frozen=True)
class Inspected:
    """Modules with factors, features beyond plain factors, and other keys of an adapter. `refusal`:
    why no model can take it; then `dialect` is empty."""

    where: str
    dialect: str
    tensors: int
    nbytes: int
    modules: tuple[Row, ...] = ()
    features: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    base: str | None = None
    refusal: str = ""

    def lines(self) -> Iterator[str]:
        """The report without `modules`."""
        yield f"dialect: {self.dialect or 'unknown'}"
        yield f"{self.tensors} tensors, {self.nbytes} bytes"
        if self.modules:
            ranks = sorted({row.sizes.rank for row in self.modules})
            yield f"{len(self.modules)} modules, rank {', '.join(map(str, ranks))}"
        if self.base:
            yield f"trained for {self.base}"
        yield from (f"feature: {feature}" for feature in self.features)
        yield from (f"not a LoRA factor: {key}" for key in self.others)
        if self.refusal:
            yield f"refused: {self.refusal}"


def inspected(given: AdapterSource) -> Inspected:
    """The contents of `given`; raises CheckpointError where it is unreadable."""
    try:
        state = load_state(given)
    except UnsupportedAdapterError as error:
        saved = opened(replace(given, config={}))  # for any configuration
        tensors = saved.tensors
        rows = tuple(Row(path, sizes, None) for path, sizes in _sizes(tensors))
        kinds = tuple(_kinds([key for key in tensors if parse(key) is None], tensors))
        return Inspected(saved.where, "", *_count(tensors), rows, others=kinds, refusal=str(error))
    config, scales = state.config, state.scales
    rows = tuple(
        Row(path, sizes, scales.get(path, config.scale(path, sizes.rank) if sizes.rank else None))
        for path, sizes in _sizes(state.tensors)
    )
    others = tuple(key for key in state.tensors if parse(key) is None)
    features = tuple(_features(state))
    counts = _count(state.tensors)
    return Inspected(state.where, state.dialect, *counts, rows, features, others, config.base_model)


def config_of(folder: Path) -> PeftConfig:
    """A folder's configuration in PEFT's terms; PEFT's tensors are not read."""
    fields, where = raw_fields(folder)
    if not mlx.configures(fields):
        return PeftConfig.read(fields, where=where)
    state = load_state(folder)
    ranks = [sizes.rank for sizes in factor_sizes(state.tensors).values() if sizes.rank]
    return replace(state.config, r=max(ranks, default=None))


def _count(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    return len(tensors), sum(tensor.nbytes for tensor in tensors.values())


def _sizes(tensors: Mapping[str, Tensor]) -> list[tuple[str, FactorSizes]]:
    return sorted((without_prefix(path), found) for path, found in factor_sizes(tensors).items())


def _kinds(keys: list[str], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Keys of unsupported methods, by their last parts: count and first."""
    kinds: dict[str, list[str]] = {}
    for key in keys:
        kinds.setdefault(key.removesuffix(".weight").rpartition(".")[2], []).append(key)
    for last, alike in kinds.items():
        shape = tuple(tensors[alike[0]].shape)
        yield f"{last}: {len(alike)} tensors, such as {alike[0][:200]} {shape}"


def _features(state: AdapterState) -> Iterator[str]:
    config = state.config
    if config.invocation:
        yield f"aLoRA: active from the tokens {list(config.invocation)} on"
    if config.use_dora:
        yield "DoRA: outputs are rescaled (use_dora)"
    if config.lora_bias:
        yield "biases of B (lora_bias)"
    if config.bias != "none":
        yield f"biases of its own (bias = {config.bias})"
    if config.use_rslora:
        yield "s = α/√r (use_rslora)"
    if config.rank_pattern or config.alpha_pattern:
        yield "ranks or α of single modules (rank_pattern, alpha_pattern)"
    if any((factor := parse(key)) and factor.embedding for key in state.tensors):
        yield "factors of embeddings"
    if config.target_parameters:
        yield f"parameters: {', '.join(config.target_parameters)} (target_parameters)"
    if config.modules_to_save:
        yield f"whole weights: {', '.join(config.modules_to_save)} (modules_to_save)"
    if config.trainable_token_indices:
        count = sum(map(len, config.trainable_token_indices.values()))
        yield f"{count} tokens of its own (trainable_token_indices)"
