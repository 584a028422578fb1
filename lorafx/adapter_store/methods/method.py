"""What the reader of a method gets, one module's tensors, and what it gives.

    factors             ΔW = s · B A,   A (R, K), B (N, R);   of a convolution K = C·∏kernel
    a changed weight    W′ = f(W)

A reader runs twice: on meta tensors, which finds wrong shapes and what the factors will take, and
then with the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.field_checks import Check, short
from lorafx.adapter_store.peft_keys import without_prefix
from lorafx.adapter_store.problems import DTYPES, Problem, Unsupported, finite_number
from lorafx.adapter_store.untrusted_files import unsound

if TYPE_CHECKING:
    from lorafx.adapter_store.peft_config import PeftConfig

MERGE = "merge it into a copy of the base model (`PeftModel.merge_and_unload()`) instead"
SAVE_PROJECTION = "(save_projection=False); save the adapter with save_projection=True"
#: Names of adapters that remain in keys of a model in memory.
_NAMES = r"(?:\.(?!weight(?:\.|$))[^.]+)?"


class MadeFactors(NamedTuple):
    """A (R, K), B (N, R) and s; None: as the configuration says, or α is R where there is none.
    `bias` (N,) is lora_B's, which s scales."""

    A: Tensor
    B: Tensor
    scale: float | None = 1.0
    bias: Tensor | None = None


class PlaceSizes(NamedTuple):
    """K and N of a place in the model, and the largest K of all places of the adapter."""

    inputs: int
    outputs: int
    widest: int


@dataclass(frozen=True, eq=False)
class AdapterMethod:
    """How adapters of a method are found and read.

    Attributes:
        name, peft_type: its names here and in PEFT's configurations, None where it has none.
        marks: pattern of the ends of keys by which it is found.
        read: its reader.
        leaves: further ends of keys that it reads at a module with marks.
        shared: ends of keys of tensors that all modules share.
        switch: the field of a LoRA configuration that asks for it, in place of `peft_type`.
        fields: fields of its configuration that the reader uses.
        training: fields that only training uses; `unread`: that the file's tensors tell better.
        complete: makes A and B of a place with these sizes, where the file lacks either, by the
            fields that the reader uses.
        lycoris: LyCORIS writes it too, without a configuration.
        absent: keys that PEFT may leave out, as far as their first dot; why, and what to do then.
        form, rank, modules: what docs/adapters.md says of it.
    """

    name: str
    peft_type: str | None
    marks: str
    read: Callable[[Given], MadeFactors | ChangedWeight]
    leaves: str = ""
    shared: str = ""
    switch: str = ""
    fields: Mapping[str, Check] = field(default_factory=dict)
    training: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    complete: (
        Callable[[Tensor, Tensor, PlaceSizes, Mapping[str, Any]], tuple[Tensor, Tensor]] | None
    ) = None
    lycoris: bool = False
    absent: Mapping[str, str] = field(default_factory=dict)
    form: str = "low rank"
    rank: str = "r"
    modules: str = "linears"

    def pattern(self) -> re.Pattern[str]:
        """Keys of its tensors: the module's part, and the end as `mark`, `leaf` or `shared`."""
        named = {"mark": self.marks, "leaf": self.leaves, "shared": self.shared}
        ends = "|".join(f"(?P<{name}>{keys})" for name, keys in named.items() if keys)
        return re.compile(rf"(?:(?P<place>.+)\.)?(?:{ends}){_NAMES}(?:\.weight)?")


class Given:
    """The tensors of one module, by the ends of their keys.

    Attributes:
        place: what their keys have before the ends; `path`: the module's, as patterns match it.
        config: the adapter's configuration, None where α is a tensor beside the factors.
        dtype: float32, or float64 where a tensor is that.
        sizes: the dimensions that are known by now, by the names that readers give them. A changed
            weight is for one of "N" and "K", or for any where they are not known.
    """

    def __init__(
        self,
        method: AdapterMethod,
        place: str,
        tensors: Mapping[str, tuple[str, Tensor]],
        config: PeftConfig | None,
        *,
        meta: bool,
    ) -> None:
        self.method, self.place, self.path = method, place, without_prefix(place)
        self.tensors, self.config, self.meta = tensors, config, meta
        wide = any(tensor.dtype == torch.float64 for _, tensor in tensors.values())
        self.dtype = torch.float64 if wide else torch.float32
        self.sizes = {"1": 1, "2": 2}
        self.taken: set[str] = set()

    def __contains__(self, leaf: str) -> bool:
        return leaf in self.tensors

    def key(self, leaf: str) -> str:
        """As the file has it."""
        return self.tensors[leaf][0]

    def take(
        self, leaf: str, *dims: str, dtype: torch.dtype | None = None, empty: bool = False
    ) -> Tensor:
        """The tensor in `self.dtype`, or as integers in `dtype`; `dims`
        name its dimensions. Raises `Problem` if it is absent, or has other sizes or (unless it may
        be `empty`) no numbers."""
        if leaf not in self.tensors:
            if why := self.method.absent.get(leaf.partition(".")[0]):
                raise Unsupported(f"{self.place} has no {leaf}, {why}")
            there = ", ".join(key for key, _ in self.tensors.values())
            raise Problem(f"{self.place} has no {leaf}, which belongs to {there}")
        self.taken.add(leaf)
        key, tensor = self.tensors[leaf]
        shape = tuple(tensor.shape)
        needed = tuple(self.sizes.get(dim, dim) for dim in dims)
        fits = len(shape) == len(dims) and (empty or all(shape))
        found = dict(zip(dims, shape, strict=True)) if fits else {}
        if tuple(self.sizes.get(dim, found.get(dim)) for dim in dims) != shape:
            raise Problem(f"{key} has shape {shape}, it needs ({', '.join(map(str, needed))})")
        self.sizes.update(found)
        numbers = tensor.is_floating_point() or tensor.is_complex()
        if tensor.dtype not in DTYPES if dtype is None else numbers:
            raise Problem(
                f"{key} is {tensor.dtype}, and it needs {dtype or 'floating-point'} numbers"
            )
        dtype = dtype or self.dtype
        if self.meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        if count := unsound(tensor):
            raise Problem(f"{key} holds {count} NaN or infinite values")
        return tensor.to(dtype)

    def kernel(self, leaf: str) -> list[str]:
        """Names of the dimensions behind the first two."""
        dims = self.tensors[leaf][1].dim() if leaf in self.tensors else 0
        return [f"kernel {i}" for i in range(1, dims - 1)]

    def pair(self, name: str, *, empty: bool = False) -> tuple[Tensor, Tensor]:
        """`name`_A (r, K) and `name`_B (N, r)."""
        a = self.take(f"{name}_A", "r", "K", empty=empty)
        return a, self.take(f"{name}_B", "N", "r", empty=empty)

    def indices(
        self, leaf: str, *dims: str, below: int | None = None, empty: bool = False
    ) -> Tensor:
        """Integers, from 0 on if they are `below` a number; raises `Problem` as `take`, and for
        others."""
        indices = self.take(leaf, *dims, dtype=torch.int64, empty=empty)
        if below is None or self.meta or not ((indices < 0) | (indices >= below)).any():
            return indices
        raise Problem(f"{self.key(leaf)} points outside of the {below} that it may name")

    def number(self, leaf: str) -> float | None:
        """The one finite number that the tensor is; None if it is absent."""
        if leaf not in self.tensors:
            return None
        self.taken.add(leaf)
        key, tensor = self.tensors[leaf]
        if (value := finite_number(tensor)) is None:
            raise Problem(f"{key} must be one finite number, it has shape {tuple(tensor.shape)}")
        return value

    def scale(self, rank: int) -> float | None:
        """α/r, with α of the tensor or of the configuration; None without either."""
        alpha = self.number("alpha")
        key = self.key("alpha") if alpha is not None else "alpha (alpha_pattern)"
        if alpha is None and self.config is not None:
            self.check_rank(rank, ", and the scale α/r depends on it")
            alpha = self.config.scale(self.path, rank) * rank
        if alpha == 0:
            raise Problem(
                f"{key} of {self.place} is 0: libraries disagree whether that is no change or "
                "α = r; write the one that is meant"
            )
        return None if alpha is None else alpha / rank

    def known_scale(self, rank: int) -> float:
        """`scale`; raises `Problem` without either."""
        scale = self.scale(rank)
        if scale is None:
            raise Problem(f"{self.place} has no alpha, and without α the scale is not known")
        return scale

    def check_rank(self, rank: int, why: str = "") -> None:
        """Raises `Problem` unless the configuration, if it names an r here, names this one."""
        configured = None if self.config is None else self.config.rank(self.path)
        if configured not in (None, rank):
            raise Problem(
                f"{self.place} has rank {rank}, adapter_config.json says {configured} there (r, "
                f"rank_pattern){why}; correct the configuration"
            )

    def option(self, name: str, default: Any = None) -> Any:
        """A field of the configuration that is the method's own."""
        return default if self.config is None else self.config.options.get(name, default)

    def choice(self, name: str, default: str, among: Iterable[str]) -> str:
        """A field that names one of these; raises `Unsupported` for another value."""
        value, names = self.option(name, default), tuple(among)
        if value not in names:
            raise Unsupported(
                f"{self.place}: {name} = {short(value)} is none of {', '.join(names)}; {MERGE}"
            )
        return str(value)


def of_delta(delta: Tensor, scale: float | None) -> MadeFactors:
    """Factors of a ΔW (N, K) of full rank: itself and the identity."""
    n, k = delta.shape
    eye = torch.eye(min(n, k), dtype=delta.dtype, device=delta.device)
    return MadeFactors(delta, eye, scale) if n <= k else MadeFactors(eye, delta, scale)
