"""Reading PEFT LoRA checkpoints: every saved tensor is placed, or an error names it.

    ΔW = s · B A,   A (r, K), B (N, r);   embeddings: A (r, V), ΔE = s · (B A)ᵀ

The rank is A's; it must be the rank that the configuration says, since s = α/r comes from there.
All problems of a file are found before anything is raised, and nothing is changed by reading.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lorafx.adapter_store.checkpoint import AdapterState, load_state, peek_shapes
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import FactorKey, Places, parse, without_prefix
from lorafx.errors import CapacityError, CheckpointError, UnsupportedAdapterError

if TYPE_CHECKING:
    from lorafx.sites import Site

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Keys of features that the configuration would have been refused for, had it named them.
_FEATURE_KEYS = {
    "lora_magnitude_vector": "DoRA (use_dora)",
    "lora_B.bias": "a bias on lora_B (lora_bias)",
    "trainable_tokens_delta": "replaced embedding rows (trainable_token_indices)",
    "modules_to_save": "replaced modules (modules_to_save)",
    "lora_diag": "KaSA (kasa_config)",
}

# Saved beside the factors and used in training only: VeLoRA compresses activations with it.
_TRAINING_KEYS = (".lora_velora_embed",)


class LoraWeights(NamedTuple):
    """One site's factors: A (r, K) and B (N, r) in the file's dtype, and s."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A decoded adapter.

    Attributes:
        name: what requests call it.
        weights: canonical site path -> factors; sites that it does not touch are absent.
        rank: the largest rank of its sites.
        source: where it was read from, for messages.
    """

    name: str
    weights: dict[str, LoraWeights]
    rank: int
    source: str


class AdapterTargets(NamedTuple):
    """What an adapter asks of a model: module paths without prefixes, and its largest rank."""

    modules: tuple[str, ...]
    rank: int


def adapter_target_modules(source: str | os.PathLike[str] | AdapterState) -> AdapterTargets:
    """The modules that an adapter's saved keys name and its largest rank, without a model.

    Raises CheckpointError (UnsupportedAdapterError for the configuration) as `read_adapter` does
    for what can be seen without the model; shapes and placement are checked there.
    """
    modules: dict[str, None] = {}
    rank = 0
    for key, shape in peek_shapes(source).items():
        factor = parse(key)
        if factor is None:
            continue
        modules[without_prefix(factor.module)] = None
        if factor.letter == "A" and shape:
            rank = max(rank, shape[0])
    if not modules or not rank:
        raise CheckpointError(f"{_called(source)} holds no LoRA factors (lora_A, lora_B)")
    return AdapterTargets(tuple(modules), rank)


def read_adapter(
    source: str | os.PathLike[str] | AdapterState,
    name: str,
    sites: Sequence[Site],
    *,
    model: nn.Module | None = None,
    max_rank: int | None = None,
) -> Adapter:
    """Read the adapter in folder `source` and place every tensor on one of `sites`.

    Args:
        source: folder with adapter_config.json and adapter_model.safetensors (or .bin), or an
            `AdapterState` in memory.
        name: what requests will call it.
        sites: the selected sites; keys may use any of their paths.
        model: root module of `sites`. With it, messages tell a module that is not selected from
            one that does not exist, saved copies of base weights are compared with the model's,
            and modules that the configuration targets but are no sites must have weights too.
        max_rank: largest rank that the banks hold.

    Raises:
        UnsupportedAdapterError: the configuration, or a key, asks for arithmetic beyond LoRA.
        CapacityError: the only problem is a rank over `max_rank`.
        CheckpointError: anything else, all problems of the file at once.
    """
    state = load_state(source)
    reading = _Reading(state, Places(sites, model), max_rank)
    weights = reading.run()
    reading.raise_problems(name)
    rank = max(w.rank for w in weights.values())
    return Adapter(name, weights, rank, state.where)


class _Reading:
    """One checkpoint on its way into site-keyed factors, with the problems met so far."""

    def __init__(self, state: AdapterState, places: Places, max_rank: int | None) -> None:
        self.state, self.places, self.max_rank = state, places, max_rank
        self.problems: list[str] = []
        self.unsupported: list[str] = []
        self.over_rank: dict[str, int] = {}
        self.sites: dict[str, Site] = {}
        self.saved_as: dict[str, str] = {}
        self.factors: dict[str, dict[str, FactorKey]] = {}
        self.unselected: dict[str, nn.Module] = {}
        self.unknown: dict[str, None] = {}

    @property
    def config(self) -> PeftConfig:
        return self.state.config

    def run(self) -> dict[str, LoraWeights]:
        for key in self.state.tensors:
            factor = parse(key)
            if factor is None:
                self._other_key(key)
            else:
                self._place(factor)
        decoded = {path: self._decode(path) for path in self.factors}
        self._report_placement()
        self._report_empty_targets()
        if not self.factors and not (self.unknown or self.unselected):
            self.problems.append("the file holds no LoRA factors (lora_A, lora_B)")
        return {path: weights for path, weights in decoded.items() if weights is not None}

    def raise_problems(self, name: str) -> None:
        problems = [*self.unsupported, *self.problems]
        if self.over_rank:
            rank = max(self.over_rank.values())
            problems.append(
                f"rank {rank} is over max_rank = {self.max_rank} ({_listed(list(self.over_rank))});"
                f" compile with LoraConfig(max_rank={rank})"
            )
        if not problems:
            return
        if self.unsupported:
            error: type[CheckpointError | CapacityError] = UnsupportedAdapterError
        else:
            error = CheckpointError if self.problems else CapacityError
        base = self.config.base_model
        trained = f", trained for {base!r}," if base else ""
        raise error(
            f"adapter {name!r} in {self.state.where}{trained} cannot be loaded:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
        )

    def _place(self, factor: FactorKey) -> None:
        found = self.places.site(factor.module)
        if found is None:
            module = self.places.module(factor.module)
            if module is not None:
                self.unselected[without_prefix(factor.module)] = module
            else:
                self.unknown[factor.module] = None
            return
        site, saved = found
        self.sites[site.path] = site
        self.saved_as.setdefault(site.path, saved)
        mine = self.factors.setdefault(site.path, {})
        if factor.embedding != (site.eligible.kind == "embedding"):
            self.problems.append(
                f"{factor.key}: {factor.factor} on {_path(site.path)}, which is "
                f"{_article(site.eligible.kind)} here ({type(site.module).__name__})"
            )
        elif factor.letter not in mine:
            mine[factor.letter] = factor
        elif not self._equal(factor.key, mine[factor.letter].key):
            self.problems.append(
                f"{factor.key} and {mine[factor.letter].key} are both {factor.factor} of "
                f"{_path(site.path)} and differ; keep one"
            )

    def _equal(self, first: str, second: str) -> bool:
        a, b = self.state.tensors[first], self.state.tensors[second]
        return a.shape == b.shape and torch.equal(a, b)

    def _decode(self, path: str) -> LoraWeights | None:
        """The site's factors, or None when a problem was noted."""
        site, keys = self.sites[path], self.factors[path]
        if not keys:
            return None  # factors of the wrong kind, noted when they were placed
        if len(keys) == 1:
            (have,) = keys.values()
            lacks = "B" if have.letter == "A" else "A"
            self.problems.append(f"{have.key}: {_path(path)} has no factor {lacks}")
            return None
        a, b = (self.state.tensors[keys[letter].key] for letter in "AB")
        if not all([self._sound(keys["A"].key, a), self._sound(keys["B"].key, b)]):
            return None
        rank = a.shape[0] if a.dim() == 2 else 0
        n, k = site.out_features, site.in_features
        fits = [
            self._shaped(keys["A"].key, a, (rank, k), f"{_path(path)} needs (r, {k})"),
            self._shaped(keys["B"].key, b, (n, rank), f"{_path(path)} needs ({n}, r = {rank})"),
        ]
        if not all(fits) or not self._rank_fits(path, rank):
            return None
        return LoraWeights(a, b, self._scale(path, rank))

    def _sound(self, key: str, tensor: Tensor) -> bool:
        if tensor.dtype not in _DTYPES:
            self.problems.append(f"{key} is {tensor.dtype}; factors must be floating point")
            return False
        if not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            self.problems.append(f"{key} holds {count} NaN or infinite values")
            return False
        return True

    def _shaped(self, key: str, tensor: Tensor, want: tuple[int, int], needs: str) -> bool:
        shape = tuple(tensor.shape)
        if shape == want and all(shape):
            return True
        if len(shape) != 2 or not all(shape):
            needs += "; a sharded model saved without gathering its shards leaves such factors"
        self.problems.append(f"{key} has shape {shape}, {needs}")
        return False

    def _rank_fits(self, path: str, rank: int) -> bool:
        said = self.config.rank(self.saved_as[path])
        if said not in (None, rank) and self.saved_as[path] not in self.state.scales:
            self.problems.append(
                f"{_path(path)} has rank {rank}, adapter_config.json says {said} there (r, "
                "rank_pattern), and the scale α/r depends on it; correct the configuration"
            )
            return False
        if self.max_rank is not None and rank > self.max_rank:
            self.over_rank[path] = rank
            return False
        return True

    def _scale(self, path: str, rank: int) -> float:
        saved = self.saved_as[path]
        return self.state.scales.get(saved, self.config.scale(saved, rank))

    def _other_key(self, key: str) -> None:
        if key.endswith(_TRAINING_KEYS):
            return
        for mark, feature in _FEATURE_KEYS.items():
            if f".{mark}" in f".{key}":
                self.unsupported.append(f"{key} belongs to {feature}, which lorafx does not do")
                return
        owner, _, attribute = key.rpartition(".")
        module = self.places.module(owner.removesuffix(".base_layer"))
        own = getattr(module, attribute, None)
        if not isinstance(own, Tensor):
            self.problems.append(f"{key} is not a LoRA factor and names nothing in the model")
        elif not _same(self.state.tensors[key], own):
            self.problems.append(
                f"{key} {tuple(self.state.tensors[key].shape)} is a base weight that differs from "
                f"the model's {tuple(own.shape)}; load it into the base model (after "
                "resize_token_embeddings, where the vocabulary grew) before compiling"
            )

    def _report_placement(self) -> None:
        for path in self.unselected:
            self.problems.append(
                f"{_path(path)} exists but was not selected to carry LoRA; add it to "
                "target_modules when compiling"
            )
        total = len(self.unknown) + len(self.unselected) + len(self.factors)
        names = list(self.unknown)
        nowhere = "in this model" if self.places.whole else "among the selected sites"
        if len(names) > total / 2:
            base = self.config.base_model
            origin = repr(base) if base else "it does not say which"
            examples = "; ".join(f"{n}{self.places.nearest(n)}" for n in names[:3])
            self.problems.insert(
                0,
                f"{len(names)} of the {total} modules that it names are not {nowhere}, so it was "
                f"made for another model ({origin}): {examples}",
            )
            return
        for at, path in enumerate(names):
            hint = self.places.nearest(path) if at < 10 else ""
            self.problems.append(f"{path}: no such module {nowhere}{hint}")

    def _report_empty_targets(self) -> None:
        """Modules that PEFT would have given weights by this configuration, and the file lacks."""
        if self.unknown:
            return  # a renamed module would be reported twice
        got = {id(self.sites[path].module) for path in self.factors}
        got |= {id(module) for module in self.unselected.values()}
        empty = [
            path
            for path, module in self.places.named_modules()
            if id(module) not in got and self.config.matches(path)
        ]
        if empty:
            self.problems.append(
                f"the configuration targets {_listed(empty)}, but the file has no weights there; "
                "it is incomplete, or target_modules names more than was trained"
            )


def _same(saved: Tensor, own: Tensor) -> bool:
    """Whether a saved copy is the model's tensor, up to the rounding of the narrower dtype."""
    if saved.shape != own.shape or not own.is_floating_point():
        return False
    if own.is_meta:
        return True  # no values to differ from; they are compared when the real model is loaded
    own = own.detach().cpu()
    return torch.equal(saved.to(own.dtype), own) or torch.equal(saved, own.to(saved.dtype))


def _path(path: str) -> str:
    return path or "the root module"


def _listed(paths: list[str], most: int = 8) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(_path, paths[:most])) + more


def _article(kind: str) -> str:
    return "an embedding" if kind == "embedding" else "a linear layer"


def _called(source: str | os.PathLike[str] | AdapterState) -> str:
    return source.where if isinstance(source, AdapterState) else str(source)
