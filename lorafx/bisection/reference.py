"""Outputs of calls, and their reference: the model's modules with W + ΔW, in eager mode.

y[b] = f(x; W + s·B A of names[b])[b]
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.compiled_model.compiled import CompiledModel
from lorafx.runtime.requests import Names
from lorafx.torch_internals.trees import tree_leaves

Modules = dict[str, list[Tensor]]

#: Of `difference`: orders of accumulation differ, and errors grow over layers.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def difference(got: Tensor, want: Tensor) -> float:
    """max |got − want| / max(1, max |want|); infinite for unequal shapes or non-finite numbers."""
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    scale = max(1.0, float(want.double().abs().max()))
    error = float((got.double() - want.double()).abs().max()) / scale
    return error if error == error else float("inf")


@dataclass(frozen=True)
class Outputs:
    """The tensors of a call's result with requests in dimension 0."""

    leaves: tuple[Tensor, ...]

    @classmethod
    def of(cls, result: Any, rows: int) -> Outputs:
        return cls(
            tuple(
                leaf.detach().clone()
                for leaf in tree_leaves(result)
                if isinstance(leaf, Tensor)
                and leaf.dim()
                and leaf.shape[0] == rows
                and leaf.is_floating_point()
            )
        )

    @classmethod
    def by_row(cls, names: Names, found: Mapping[str | None, Outputs]) -> Outputs:
        leaves = zip(*(found[name].leaves for name in names), strict=True)
        return cls(
            tuple(torch.stack([leaf[row] for row, leaf in enumerate(rows)]) for rows in leaves)
        )

    def rows(self, which: Sequence[int]) -> Outputs:
        return Outputs(tuple(leaf[list(which)] for leaf in self.leaves))

    @property
    def tolerance(self) -> float:
        return max((_TOLERANCE.get(leaf.dtype, 1e-4) for leaf in self.leaves), default=0.0)

    def error(self, want: Outputs, mask: Tensor | None = None) -> float:
        """The largest error of a leaf. `mask` (B, T) excludes padding of leaves (B, T, ...)."""
        if len(self.leaves) != len(want.leaves):
            raise ValueError(f"{len(self.leaves)} outputs, and {len(want.leaves)} of the reference")
        worst = 0.0
        for got, right in zip(self.leaves, want.leaves, strict=True):
            if mask is not None and got.shape[:2] == right.shape[:2] == mask.shape:
                got, right = got[mask.bool()], right[mask.bool()]
            worst = max(worst, difference(got, right))
        return worst


@dataclass
class Reference:
    """Adapter (None: the base) -> outputs of the whole batch, and results by site path."""

    outputs: dict[str | None, Outputs] = field(default_factory=dict)
    modules: dict[str | None, Modules] = field(default_factory=dict)


def reference(
    compiled: CompiledModel, inputs: Mapping[str, Any], names: Sequence[str | None]
) -> Reference:
    """The outputs with each adapter merged in turn. Raises MatchError where that is impossible."""
    found = Reference()
    with compiled._session.lock, compiled.disable_adapter():
        for name in dict.fromkeys(names):
            with _merged(compiled, name), _results(compiled) as found.modules[name]:
                found.outputs[name] = Outputs.of(fresh(compiled.model, inputs), len(names))
    return found


def fresh(call: Callable[..., Any], inputs: Mapping[str, Any], **more: Any) -> Any:
    """A call with copied inputs, since calls write into caches."""
    with torch.no_grad():
        return call(**copy.deepcopy(dict(inputs)), **more)


@contextmanager
def _merged(compiled: CompiledModel, name: str | None) -> Iterator[None]:
    if name is None:
        yield
        return
    compiled.merge(name)
    try:
        yield
    finally:
        compiled.unmerge()


@contextmanager
def _results(compiled: CompiledModel) -> Iterator[Modules]:
    noted: Modules = {}

    def hook(path: str) -> Any:
        def run(module: nn.Module, args: Any, result: Any) -> None:
            if isinstance(result, Tensor):
                noted.setdefault(path, []).append(result.detach().clone())

        return run

    handles = [
        site.module.register_forward_hook(hook(site.path))
        for site in compiled.sites
        if site.expert_weight is None
    ]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()
