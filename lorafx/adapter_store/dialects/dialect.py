"""What the translations of all dialects to PEFT's names share.

<module>.lora_A.weight (r, K), <module>.lora_B.weight (N, r), and s by module
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import factor_sizes, parse
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError
from lorafx.model.module_graph import join
from lorafx.model.saved_names import without_compiled
from lorafx.registry import lookup

_VECTORS = {"m": "lora_magnitude_vector", "b": "lora_B.bias"}


class Names:
    """Paths of modules in a model, also with underscores in place of dots."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._places = model, Places((), model)

    def module(self, path: str) -> nn.Module | None:
        return self._places.module(path)

    def has(self, path: str) -> bool:
        return self.module(path) is not None

    def lost(self, state: AdapterState) -> list[str]:
        """The paths with factors that the model lacks."""
        factors = [factor for key in state.tensors if (factor := parse(key)) is not None]
        paths = dict.fromkeys(factor.module for factor in factors)
        return [path for path in paths if not self.has(path)]

    def path(self, name: str, flat: bool) -> str:
        """The model's path for `name`, whose dots may be underscores. A `flat` name may begin with
        a wrapper that the model lacks (`text_model` of CLIP in transformers 5). Unknown names stay.
        CheckpointError for one that several modules have."""
        if not flat and self.has(name):
            return name
        underscored = name.replace(".", "_")
        for cut in range(3 if flat else 1):
            inner = underscored.split("_", cut)[-1]
            paths = self.flat.get(inner, [])
            if len(paths) > 1:
                raise CheckpointError(
                    f"{name} may be {' or '.join(paths)}, which are spelt alike without dots; save "
                    "the adapter in another dialect (diffusers, PEFT)"
                )
            for path in paths:
                return join(underscored.removesuffix(inner).removesuffix("_"), path)
        return name

    @cached_property
    def flat(self) -> Mapping[str, list[str]]:
        """Paths of modules with weights by their flattened forms."""
        paths: dict[str, list[str]] = {}
        for name, module in self._model.named_modules():
            if name and module._parameters:
                path = without_compiled(name)
                paths.setdefault(path.replace(".", "_"), []).append(path)
        return paths


class Translation:
    """Collects factors under PEFT's names."""

    def __init__(self, saved: Saved, dialect: str, names: Names | None) -> None:
        self.saved, self.dialect, self.names = saved, dialect, names
        self.tensors: dict[str, Tensor] = {}
        self.scales: dict[str, float] = {}
        self.left_out: tuple[str, ...] = ()

    def add(self, path: str, letter: str, tensor: Tensor, embedding: bool = False) -> None:
        """Add "A" (r, K), "B" (N, r), DoRA's "m" (N,) or B's bias "b" (N,). Raises as `put`."""
        if letter in _VECTORS:
            self.put(join(path, _VECTORS[letter]), tensor)
            return
        module = None if self.names is None else self.names.module(path)
        entry = None if module is None else lookup(module)
        if embedding or (entry is not None and entry.kind == "embedding"):
            self.put(join(path, f"lora_embedding_{letter}"), tensor)
            return
        weight = getattr(module, "weight", None)
        dims = weight.dim() if isinstance(weight, Tensor) else 0
        if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and dims == 2:
            tensor = tensor[..., 0, 0]  # trained on a 1×1 convolution, which is a linear here
        elif tensor.dim() == 2 and dims == 4:
            tensor = tensor[..., None, None]
        self.put(join(path, f"lora_{letter}.weight"), tensor)

    def put(self, key: str, tensor: Tensor) -> None:
        """Add a tensor under its PEFT key. Raises CheckpointError for a duplicate."""
        if key in self.tensors:
            raise CheckpointError(f"{self.saved.where} has two keys that mean {key}; keep one")
        self.tensors[key] = tensor

    def state(self, config: PeftConfig | None = None, *, dora: bool = False) -> AdapterState:
        """The adapter. Without a `config` of its files, `dora` or its keys say that it is DoRA, and
        factors without a scale raise CheckpointError."""
        if config is None:
            config = PeftConfig(
                use_dora=dora or any(key.endswith(_VECTORS["m"]) for key in self.tensors),
                lora_bias=any(key.endswith(_VECTORS["b"]) for key in self.tensors),
            )
            for path, sizes in factor_sizes(self.tensors).items():
                if sizes.rank and path not in self.scales:
                    raise CheckpointError(
                        f"{self.saved.where} ({self.dialect}) has factors for {path}, and nothing "
                        "gives their scale; save the adapter in PEFT's format"
                    )
        return AdapterState(
            config,
            self.tensors,
            f"{self.saved.where} ({self.dialect})",
            self.scales,
            self.dialect,
            self.left_out,
        )


def raw(fields: Mapping[str, Any] | PeftConfig | None) -> Mapping[str, Any]:
    """The fields of a dialect's own configuration; {} for PEFT's."""
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
