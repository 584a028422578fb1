"""What the adapters of a family target beside linears and the token embedding.

A router is found by what it does: a module of no class that PEFT wraps, whose matrix `weight` is
multiplied with in the forward. PEFT names routers and experts by `target_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import oracle
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset(
    {
        torch.nn.functional.linear,
        torch.matmul,
        torch.mm,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.mm,
    }
)


@dataclass(frozen=True)
class Sites:
    """Paths: of modules, or (routers, experts) of parameters."""

    linears: tuple[str, ...]
    embeddings: tuple[str, ...]
    routers: tuple[str, ...]
    experts: tuple[str, ...]

    @property
    def routed(self) -> bool:
        return bool(self.routers or self.experts)

    def without_routing(self) -> Sites:
        return replace(self, routers=(), experts=())


def sites_of(model: nn.Module, batch: Mapping[str, Any]) -> Sites:
    """What adapters can target in `model`; `batch` are arguments of a forward that uses it."""
    return Sites(
        linears=tuple(oracle.linears(model)),
        embeddings=tuple(oracle.embeddings(model)),
        routers=_routers(model, batch),
        experts=tuple(
            f"{path}.{name}" for path, names in experts_of(model).items() for name in names
        ),
    )


def experts_of(model: nn.Module) -> dict[str, list[str]]:
    """{path: names of its 3-D parameters} of the modules that hold a matrix for each expert."""
    found = {}
    for path, module in model.named_modules():
        names = [
            name
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() == 3
        ]
        if names and "xpert" in type(module).__name__:
            found[path] = names
    return found


class _Multiplied(TorchFunctionMode):
    """Notes the tensors that are operands of a matrix product, through transposes and casts."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()
        self._kept: list[Tensor] = []  # an address is only itself while its tensor lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            operands = [item for item in args if isinstance(item, Tensor)]
            self._kept += operands
            self.storages.update(item.untyped_storage().data_ptr() for item in operands)
        return result


def _routers(model: nn.Module, batch: Mapping[str, Any]) -> tuple[str, ...]:
    known = {*oracle.linears(model)}
    matrices = {
        f"{path}.weight": module._parameters["weight"]
        for path, module in model.named_modules()
        if path not in known
        and not isinstance(module, nn.Embedding)
        and isinstance(weight := module._parameters.get("weight"), Tensor)
        and weight.dim() == 2
    }
    if not matrices:
        return ()
    with _Multiplied() as seen, torch.no_grad():
        model(**batch)
    return tuple(
        name
        for name, weight in matrices.items()
        if weight.untyped_storage().data_ptr() in seen.storages
    )
