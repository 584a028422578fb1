"""What a dialect is: it knows its own files, and says them in PEFT's names.

<module>.lora_A.weight (r, K), <module>.lora_B.weight (N, r), and s by module
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError
from lorafx.registry import lookup

_VECTORS = {"m": "lora_magnitude_vector", "b": "lora_B.bias"}


class Dialect(ABC):
    """One way to save an adapter.

    Attributes:
        name: what `AdapterSource.dialect` calls it.
        keys: its keys, for messages.
    """

    name: ClassVar[str]
    keys: ClassVar[str]

    @abstractmethod
    def claims(self, saved: Saved) -> bool:
        """Whether `saved` is in this dialect, by its keys."""

    @abstractmethod
    def state(self, saved: Saved, model: nn.Module | None) -> AdapterState:
        """`saved` in PEFT's names. Tensors are views of the saved ones; every key is placed under a
        name of PEFT's, or stays as it is for the reader to refuse.

        Raises:
            CheckpointError: keys that cannot be read, or a configuration that lacks what it needs.
            UnsupportedAdapterError: arithmetic beyond LoRA.
        """

    def components(self, saved: Saved) -> tuple[str, ...]:
        """The models of a pipeline that `saved` has factors for; "" stands for one that its keys do
        not name."""
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
        """The module at `path` of the model, None where there is none, or no model."""
        return None if self._places is None else self._places.module(path)

    def exists(self, path: str) -> bool:
        """Whether the model has a module at `path`."""
        return self.module(path) is not None

    def held(self, path: str) -> bool:
        """Whether the model has a module at `path` without its first name, which may be that of the
        model that held this one: transformers 5 has no `text_model` around CLIP's."""
        rest = path.partition(".")[2]
        return bool(rest) and self.exists(rest)

    def add(self, path: str, letter: str, tensor: Tensor) -> None:
        """Factor "A" (r, K) or "B" (N, r), DoRA's "m" (N,), or B's bias "b" (N,), of the module at
        `path`.

        Raises:
            CheckpointError: there is one already.
        """
        module = self.module(path)
        if letter in _VECTORS:
            self.put(f"{path}.{_VECTORS[letter]}", tensor)
            return
        entry = None if module is None else lookup(module)
        if entry is not None and entry.kind == "embedding":
            self.put(f"{path}.lora_embedding_{letter}", tensor)
            return
        weight = getattr(module, "weight", None)
        if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and _dims(weight) == 2:
            tensor = tensor[..., 0, 0]  # trained on a 1×1 convolution, which is a linear here
        elif tensor.dim() == 2 and _dims(weight) == 4:
            tensor = tensor[..., None, None]
        self.put(f"{path}.lora_{letter}.weight", tensor)

    def put(self, key: str, tensor: Tensor) -> None:
        """Take a tensor under its name in PEFT. CheckpointError where there is one already."""
        if key in self.tensors:
            raise CheckpointError(f"{self.saved.where} has two keys that mean {key}; keep one")
        self.tensors[key] = tensor

    def keep(self, key: str) -> None:
        """Leave a key to the reader."""
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
    """Fields of a dialect's own configuration; none where there is another one."""
    return {} if fields is None or isinstance(fields, PeftConfig) else fields


def number(key: str, tensor: Tensor) -> float:
    """α, saved as the tensor `key`.

    Raises:
        CheckpointError: it is not one finite number.
    """
    value = float("nan")
    if tensor.numel() == 1 and not tensor.is_complex():
        value = float(tensor.item())
    if not math.isfinite(value):
        raise CheckpointError(
            f"{key} must be one finite number, it has shape {tuple(tensor.shape)} and dtype "
            f"{tensor.dtype}"
        )
    return value


def _dims(weight: Any) -> int:
    return weight.dim() if isinstance(weight, Tensor) else 0
