"""Keys of PEFT checkpoints: which factor a key holds, of what path, and of which rank.

    base_model.model.<module>.lora_A.weight            (r, K)     linear
    base_model.model.<module>.lora_B.weight            (N, r)
    base_model.model.<module>.lora_B.bias              (N,)       lora_bias
    base_model.model.<module>.lora_A.weight            (r, C, kernel...)           convolution
    base_model.model.<module>.lora_B.weight            (N, r / groups, 1, ...)
    base_model.model.<module>.lora_embedding_A         (r, V)     embedding, no `.weight`
    base_model.model.<module>.lora_embedding_B         (N, r)
    base_model.model.<module>.lora_magnitude_vector    (N,)       DoRA, beside either

Seen in the wild as well: an adapter name left over (`lora_A.default.weight`). What the path leads
to is for lorafx.model.saved_names to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from lorafx.model.saved_names import PREFIX, without_compiled

Factor = Literal[
    "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_bias"
]
Letter = Literal["A", "B", "m", "b"]

_FACTOR = re.compile(
    r"^(?:(?P<module>.+)\.)?(?P<factor>lora_(?:(?:embedding_)?[AB]|magnitude_vector))"
    r"(?:\.(?!bias$)(?P<adapter>[^.]+))??(?:\.weight)?$"
)
#: Endings of what is saved beside the factors and used in training only: VeLoRA compresses
#: activations with it.
TRAINING_KEYS = (".lora_velora_embed",)

_BIAS = re.compile(r"^(?:(?P<module>.+)\.)?lora_B(?:\.[^.]+)??\.bias$")


@dataclass(frozen=True)
class FactorKey:
    """A key that holds one low-rank factor, DoRA's m, or the bias of lora_B. `module` is the path
    before it, prefixes included."""

    key: str
    module: str
    factor: Factor

    @property
    def letter(self) -> Letter:
        if self.factor == "lora_magnitude_vector":
            return "m"
        if self.factor == "lora_bias":
            return "b"
        return "A" if self.factor.endswith("A") else "B"

    @property
    def embedding(self) -> bool:
        return "embedding" in self.factor


def parse(key: str) -> FactorKey | None:
    """The factor (or m, or bias) that `key` holds, or None if it is not such a key."""
    bias = _BIAS.match(key)
    if bias is not None:
        return FactorKey(key, bias["module"] or "", "lora_bias")
    found = _FACTOR.match(key)
    if found is None:
        return None
    factor: Factor = found["factor"]  # type: ignore[assignment]
    return FactorKey(key, found["module"] or "", factor)


def without_prefix(path: str) -> str:
    """`path` without `_orig_mod` components and without one leading `base_model.model.`."""
    return candidates(path)[0]


def candidates(path: str) -> tuple[str, ...]:
    """The module paths that a saved path may mean, likeliest first.

    PEFT always writes `base_model.model.`; a path that begins so and is meant as it stands comes
    from a writer without prefixes and a model with such attributes.
    """
    plain = without_compiled(path)
    stripped = (plain + ".").removeprefix(PREFIX).rstrip(".")
    return (stripped,) if stripped == plain else (stripped, plain)


class FactorSizes(NamedTuple):
    """K, N and r of a pair of saved factors, 0 where the file does not show them. K of a
    convolution is the number of its input channels."""

    in_features: int
    out_features: int
    rank: int


def factor_sizes(tensors: Mapping[str, Tensor]) -> dict[str, FactorSizes]:
    """The sizes of the factors of each module, by its path in the keys of `tensors`.

    Factors of three dimensions are those of experts, A (E, r, K) and B (E, N, r), or of a Conv1d,
    whose B ends in 1 and whose r is a multiple of what stands before that. The rows of experts'
    factors in two dimensions, (r·E, K), are counted as they are.
    """
    shapes: dict[str, dict[Letter, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        factor = parse(key)
        if factor is not None:
            shapes.setdefault(factor.module, {})[factor.letter] = tuple(tensor.shape)
    return {path: _sizes(own.get("A", ()), own.get("B", ())) for path, own in shapes.items()}


def _sizes(a: tuple[int, ...], b: tuple[int, ...]) -> FactorSizes:
    conv1d = len(a) == len(b) == 3 and b[2] == 1 and b[1] > 0 and a[0] % b[1] == 0
    if conv1d or len(a) > 3:
        return FactorSizes(a[1], b[0] if b else 0, a[0])
    # of experts, or matrices
    rank, k = a[-2:] if len(a) > 1 else (*a, 0) if a else (0, 0)
    return FactorSizes(k, b[-2] if len(b) > 1 else sum(b), rank)
