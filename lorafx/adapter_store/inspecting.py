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
from lorafx.adapter_store.peft_keys import parse, without_prefix
from lorafx.adapter_store.saved import AdapterSource, AdapterState
from lorafx.errors import UnsupportedAdapterError


@dataclass(frozen=True)
class Row:
    """A module's factors: `sizes` are (K, N, r), 0 for what is not known; s, None likewise."""

    path: str
    sizes: tuple[int, int, int]
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
            ranks = sorted({row.sizes[2] for row in self.modules})
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
        shapes, others = _shapes(saved.tensors)
        rows = tuple(Row(path, _sizes(own), None) for path, own in sorted(shapes.items()))
        kinds = tuple(_kinds({key: saved.tensors[key] for key in others}))
        count = len(saved.tensors)
        return Inspected(saved.where, "", count, size, rows, (), kinds, refusal=str(error))
    shapes, others = _shapes(state.tensors)
    return Inspected(
        state.where,
        state.dialect,
        len(state.tensors),
        sum(tensor.nbytes for tensor in state.tensors.values()),
        tuple(_row(state, path, own) for path, own in sorted(shapes.items())),
        tuple(_features(state)),
        tuple(others),
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
    keys = (key for key in state.tensors if (factor := parse(key)) and factor.letter == "A")
    ranks = [state.tensors[key].shape[-2] for key in keys]
    return replace(state.config, r=max(ranks, default=None))


def _shapes(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, tuple[int, ...]]], list[str]]:
    """Shapes of factors by module and letter, and the keys that are no factors."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    others = []
    for key, tensor in tensors.items():
        factor = parse(key)
        if factor is None:
            others.append(key)
        else:
            own = shapes.setdefault(without_prefix(factor.module), {})
            own[factor.letter] = tuple(tensor.shape)
    return shapes, others


def _kinds(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Keys of a method that is not supported, by their last parts: how many, and the first."""
    kinds: dict[str, list[str]] = {}
    for key in tensors:
        last = key.removesuffix(".weight").rpartition(".")[2]
        kinds.setdefault(last, []).append(key)
    for last, keys in kinds.items():
        shape = tuple(tensors[keys[0]].shape)
        yield f"{last}: {len(keys)} tensors, such as {keys[0][:200]} {shape}"


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int]:
    a, b = shapes.get("A", ()), shapes.get("B", ())
    rank = a[-2] if len(a) == 3 else a[0] if a else 0
    return a[-1] if len(a) in (2, 3) else a[1] if len(a) > 1 else 0, b[0] if b else 0, rank


def _row(state: AdapterState, path: str, shapes: dict[str, tuple[int, ...]]) -> Row:
    sizes = _sizes(shapes)
    rank = sizes[2]
    known = state.scales.get(path)
    if known is None and rank:
        known = state.config.scale(path, rank)
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
