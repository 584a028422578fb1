"""What outputs ought to be: W + ΔW of each adapter in the model's own modules, in eager mode.

y[b] = f(x; W + s·B A of names[b])[b]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorafx.bisection.outputs import Outputs, fresh
from lorafx.serving.compiled import CompiledModel

#: The results of a site's calls, in their order.
Modules = dict[str, list[Tensor]]


@dataclass
class Reference:
    """By adapter, None for the base: outputs of the whole batch, and results of each site, by path
    in the order of the first calls."""

    outputs: dict[str | None, Outputs] = field(default_factory=dict)
    modules: dict[str | None, Modules] = field(default_factory=dict)


def reference(
    compiled: CompiledModel, inputs: Mapping[str, Any], names: Sequence[str | None], rows: int
) -> Reference:
    """The reference for these adapters. Each is merged into the weights and taken out again.

    Raises:
        MatchError: an adapter cannot be merged.
    """
    found = Reference()
    with compiled._session.lock, compiled.disable_adapter():
        for name in dict.fromkeys(names):
            with _merged(compiled, name), _results(compiled) as modules:
                found.outputs[name] = Outputs.of(fresh(compiled.model, inputs), rows)
            found.modules[name] = modules
    return found


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
    """Inside, the results of the modules that are sites are noted."""
    noted: Modules = {}

    def note(path: str, result: Any) -> None:
        if isinstance(result, Tensor):
            noted.setdefault(path, []).append(result.detach().clone())

    def hook(path: str) -> Any:
        def run(module: nn.Module, args: Any, result: Any) -> None:
            note(path, result)

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
