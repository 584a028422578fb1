"""Keys of PEFT checkpoints: factor, path and rank.

    base_model.model.<module>.lora_A.weight            (r, K)     linear
    base_model.model.<module>.lora_B.weight            (N, r)
    base_model.model.<module>.lora_B.bias              (N,)       lora_bias
    base_model.model.<module>.lora_A.weight            (r, C, kernel...)           convolution
    base_model.model.<module>.lora_B.weight            (N, r / groups, 1, ...)
    base_model.model.<module>.lora_embedding_A         (r, V)     embedding, no `.weight`
    base_model.model.<module>.lora_embedding_B         (N, r)
    base_model.model.<module>.lora_magnitude_vector    (N,)       DoRA, beside either
    base_model.model.<module>.lora_W.weight            (N, K)     a changed weight (methods/)

Names of adapters may remain (`lora_A.default.weight`). lorafx.model.saved_names resolves paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

from torch import Tensor

from lorafx.model.saved_names import PREFIX, without_compiled

Letter = Literal["A", "B", "W", "m", "b"]

#: Names of adapters that remain, one in another.
_NAMES = r"(?:\.(?!(?:weight|bias|alpha)(?:\.|$))[^.]+){0,2}?"
_FACTOR = re.compile(
    r"^(?:(?P<module>.+)\.)?(?P<factor>lora_(?:(?:embedding_)?[AB]|W|magnitude_vector))"
    rf"{_NAMES}(?:\.weight)?$"
)
_BIAS = re.compile(rf"^(?:(?P<module>.+)\.)?lora_B{_NAMES}\.bias$")
_LETTERS: Mapping[str, Letter] = {
    **{f"{name}_{letter}": letter for name in ("lora", "lora_embedding") for letter in ("A", "B")},
    **{"lora_W": "W", "lora_magnitude_vector": "m", "lora_bias": "b"},
}
#: Tensors used in training only: VeLoRA compresses activations with them, MonteCLoRA samples.
TRAINING_KEY = re.compile(r".*\.lora_(?:velora_embed|monteclora_sampler\..+)")


class FactorKey(NamedTuple):
    """The key of a factor ("A", "B"), a changed weight "W", DoRA's "m", or lora_B's bias "b".
    `module` is its path with prefixes; `factor` is its name in messages."""

    key: str
    module: str
    factor: str

    @property
    def letter(self) -> Letter:
        return _LETTERS[self.factor]

    @property
    def embedding(self) -> bool:
        return "embedding" in self.factor


@lru_cache(1 << 14)
def parse(key: str) -> FactorKey | None:
    bias = _BIAS.match(key)
    if bias is not None:
        return FactorKey(key, bias["module"] or "", "lora_bias")
    factor = _FACTOR.match(key)
    return None if factor is None else FactorKey(key, factor["module"] or "", factor["factor"])


def without_prefix(path: str) -> str:
    """`path` without `_orig_mod` components and without one leading `base_model.model.`."""
    return candidates(path)[0]


def candidates(path: str) -> tuple[str, ...]:
    """Module paths for a saved path, likeliest first: an attribute may be named like the prefix."""
    plain = without_compiled(path)
    stripped = (plain + ".").removeprefix(PREFIX).rstrip(".")
    return (stripped,) if stripped == plain else (stripped, plain)


class FactorSizes(NamedTuple):
    """K (of a convolution: input channels), N and r of a pair of factors, 0 where unknown."""

    in_features: int
    out_features: int
    rank: int


def factor_sizes(tensors: Mapping[str, Tensor]) -> dict[str, FactorSizes]:
    """The sizes of the factors of each module, by its path in the keys.

    Factors of three dimensions are experts', A (E, r, K) and B (E, N, r), or a Conv1d's, whose B
    ends in 1 and whose r is a multiple of the dimension before. The rows of two-dimensional factors
    of experts, (r·E, K), are counted as they are.
    """
    shapes: dict[str, dict[Letter, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        factor = parse(key)
        if factor is not None:
            shapes.setdefault(factor.module, {})[factor.letter] = tuple(tensor.shape)
    return {path: _sizes(pair.get("A", ()), pair.get("B", ())) for path, pair in shapes.items()}


def _sizes(a: tuple[int, ...], b: tuple[int, ...]) -> FactorSizes:
    conv1d = len(a) == len(b) == 3 and b[2] == 1 and b[1] > 0 and a[0] % b[1] == 0
    if conv1d or len(a) > 3:
        return FactorSizes(a[1], b[0] if b else 0, a[0])
    # The factors are experts' or matrices.
    rank, k = a[-2:] if len(a) > 1 else (*a, 0) if a else (0, 0)
    return FactorSizes(k, b[-2] if len(b) > 1 else sum(b), rank)
