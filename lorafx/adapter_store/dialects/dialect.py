"""The interface of dialects: recognise files, and translate them to PEFT's names.

<module>.lora_A.weight (r, K), <module>.lora_B.weight (N, r), and s by module
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError
from lorafx.registry import lookup

#: Names in files of a pipeline's denoising model.
DENOISERS = ("unet", "transformer", "diffusion_model")
_VECTORS = {"m": "lora_magnitude_vector", "b": "lora_B.bias"}


class Dialect(ABC):
    """A way to save adapters: its `name` in `AdapterSource.dialect`, its `keys` in messages."""

    name: ClassVar[str]
    keys: ClassVar[str]

    @abstractmethod
    def claims(self, saved: Saved) -> bool:
        """Whether the keys of `saved` are of this dialect."""

    @abstractmethod
    def state(self, saved: Saved, model: nn.Module | None) -> AdapterState:
        """`saved` in PEFT's names, with views of its tensors; unknown keys are left for the reader
        to refuse. Raises CheckpointError and UnsupportedAdapterError."""

    def components(self, saved: Saved) -> tuple[str, ...]:
        """The models of a pipeline with factors in `saved`; "" where the keys name none."""
        return ("",)


class Translation:
    """Factors on their way into PEFT's names."""

    def __init__(self, saved: Saved, dialect: Dialect, model: nn.Module | None) -> None:
        self.saved, self.dialect = saved, dialect
        self.tensors: dict[str, Tensor] = {}
        self.scales: dict[str, float] = {}
        self.left_out: tuple[str, ...] = ()
        self._places = None if model is None else Places((), model)

    def module(self, path: str) -> nn.Module | None:
        return None if self._places is None else self._places.module(path)

    def exists(self, path: str) -> bool:
        return self.module(path) is not None

    def held(self, path: str) -> bool:
        """Whether `path` exists without its first name: transformers 5's CLIP has no
        `text_model`."""
        rest = path.partition(".")[2]
        return bool(rest) and self.exists(rest)

    def add(self, path: str, letter: str, tensor: Tensor) -> None:
        """Add "A" (r, K), "B" (N, r), DoRA's "m" (N,) or B's bias "b" (N,); duplicates are an
        error."""
        if letter in _VECTORS:
            self.put(f"{path}.{_VECTORS[letter]}", tensor)
            return
        module = self.module(path)
        entry = None if module is None else lookup(module)
        if entry is not None and entry.kind == "embedding":
            self.put(f"{path}.lora_embedding_{letter}", tensor)
            return
        weight = getattr(module, "weight", None)
        dims = weight.dim() if isinstance(weight, Tensor) else 0
        if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and dims == 2:
            tensor = tensor[..., 0, 0]  # trained on a 1×1 convolution, which is a linear here
        elif tensor.dim() == 2 and dims == 4:
            tensor = tensor[..., None, None]
        self.put(f"{path}.lora_{letter}.weight", tensor)

    def put(self, key: str, tensor: Tensor) -> None:
        """Add a tensor under its PEFT key; duplicates raise CheckpointError."""
        if key in self.tensors:
            raise CheckpointError(f"{self.saved.where} has two keys that mean {key}; keep one")
        self.tensors[key] = tensor

    def keep(self, key: str) -> None:
        self.put(key, self.saved.tensors[key])

    def state(self, config: PeftConfig) -> AdapterState:
        return AdapterState(
            config,
            self.tensors,
            f"{self.saved.where} ({self.dialect.name})",
            self.scales,
            self.dialect.name,
            self.left_out,
        )


def raw(fields: Mapping[str, Any] | PeftConfig | None) -> Mapping[str, Any]:
    """The fields of a dialect's configuration; none of PEFT's."""
    return {} if fields is None or isinstance(fields, PeftConfig) else fields


def alpha_of(key: str, tensor: Tensor) -> float:
    """α from the tensor `key`; CheckpointError unless it is one finite number."""
    value = float("nan")
    if tensor.numel() == 1 and not tensor.is_complex():
        value = float(tensor.item())
    if not math.isfinite(value):
        raise CheckpointError(
            f"{key} must be one finite number, it has shape {tuple(tensor.shape)} and dtype "
            f"{tensor.dtype}"
        )
    return value


def component_of(
    groups: Mapping[str, Collection[str]],
    tests: Sequence[Callable[[str], bool]],
    given: str | None,
    where: str,
) -> str | None:
    """The file's component with names of the model; None without such names and with several
    components.

    `tests` for a name are tried strictest first, each only if no name passes the previous ones.
    Raises CheckpointError where several fit, or `given` is not in the file.
    """
    if given is not None:
        if given not in groups:
            raise CheckpointError(
                f"{where} has no factors for the component {given!r}; it has some for "
                f"{', '.join(sorted(groups))}"
            )
        return given
    if len(groups) == 1:
        return next(iter(groups))
    for has in tests:
        fit = [component for component, names in groups.items() if any(map(has, names))]
        whole = [component for component in fit if all(map(has, groups[component]))]
        fit = whole if len(whole) == 1 else fit
        if len(fit) > 1:
            raise CheckpointError(
                f"{where} has factors for {' and '.join(fit)}, which both fit this model; say "
                f"which by AdapterSource(..., component={fit[0]!r})"
            )
        if fit:
            return fit[0]
    return None
