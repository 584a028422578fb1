"""What an adapter holds, without a model: for `lorafx inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lorafx.adapter_store.checkpoint import load_state
from lorafx.adapter_store.config_source import raw_fields
from lorafx.adapter_store.dialects.mlx import Mlx
from lorafx.adapter_store.opening import opened
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import FactorSizes, factor_sizes, parse, without_prefix
from lorafx.adapter_store.saved import AdapterSource, AdapterState
from lorafx.errors import UnsupportedAdapterError


@dataclass(frozen=True)
class Row:
    """A module's factors: their sizes, and s, None where it is not known."""

    path: str
    sizes: FactorSizes
    scale: float | None


@dataclass(frozen=True)
class Inspected:
    """What an adapter holds.

    Attributes:
        where: what it was read from.
        dialect: what it is written in; "" where it is refused before that is known.
        tensors, nbytes: how many tensors, and their bytes.
        modules: those with factors, in order.
        features: what it has beside plain factors.
        others: keys that are no factors.
        base: the model that it says it was trained for.
        refusal: why it would be refused whatever the model; "" where it would not.
    """

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
        """The report, `modules` apart."""
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


def inspected(asked: AdapterSource) -> Inspected:
    """What `asked` holds.

    Raises:
        CheckpointError: it cannot be read at all. What lorafx does not support is in `refusal`.
    """
    try:
        state = load_state(asked)
    except UnsupportedAdapterError as error:
        saved = opened(replace(asked, config={}))  # whatever the configuration asks for
        size = sum(tensor.nbytes for tensor in saved.tensors.values())
        rows = tuple(Row(path, own, None) for path, own in sorted(_sizes(saved.tensors).items()))
        kinds = tuple(_kinds({key: saved.tensors[key] for key in _others(saved.tensors)}))
        count = len(saved.tensors)
        return Inspected(saved.where, "", count, size, rows, (), kinds, refusal=str(error))
    return Inspected(
        state.where,
        state.dialect,
        len(state.tensors),
        sum(tensor.nbytes for tensor in state.tensors.values()),
        tuple(_row(state, path, found) for path, found in sorted(_sizes(state.tensors).items())),
        tuple(_features(state)),
        tuple(_others(state.tensors)),
        state.config.base_model,
    )


def config_of(folder: Path) -> PeftConfig:
    """What an adapter's folder asks for, in PEFT's terms; of PEFT's own no tensor is read.

    Raises as `load_state`.
    """
    fields, where = raw_fields(folder)
    if not Mlx.configures(fields):
        return PeftConfig.read(fields, where=where)
    state = load_state(folder)
    ranks = [sizes.rank for sizes in factor_sizes(state.tensors).values() if sizes.rank]
    return replace(state.config, r=max(ranks, default=None))


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, FactorSizes]:
    return {without_prefix(path): own for path, own in factor_sizes(tensors).items()}


def _others(tensors: Mapping[str, Tensor]) -> list[str]:
    """The keys that are no factors."""
    return [key for key in tensors if parse(key) is None]


def _kinds(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Keys of a method that is not supported, by their last parts: how many, and the first."""
    kinds: dict[str, list[str]] = {}
    for key in tensors:
        last = key.removesuffix(".weight").rpartition(".")[2]
        kinds.setdefault(last, []).append(key)
    for last, keys in kinds.items():
        shape = tuple(tensors[keys[0]].shape)
        yield f"{last}: {len(keys)} tensors, such as {keys[0][:200]} {shape}"


def _row(state: AdapterState, path: str, sizes: FactorSizes) -> Row:
    known = state.scales.get(path)
    if known is None and sizes.rank:
        known = state.config.scale(path, sizes.rank)
    return Row(path, sizes, known)


def _features(state: AdapterState) -> Iterator[str]:
    config = state.config
    if config.invocation:
        yield f"aLoRA: active from the tokens {list(config.invocation)} on"
    if config.use_dora:
        yield "DoRA: outputs are rescaled (use_dora)"
    if config.block_diagonal is not None:
        yield f"{config.block_diagonal.blocks} blocks on a diagonal (use_bdlora)"
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
