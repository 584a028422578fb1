"""State of one PEFT model's graph on its way through the passes that know PEFT's arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch._guards import detect_fake_mode

import lorafx.kernels.factor_ops  # noqa: F401  (defines torch.ops.lorafx.factors)
from lorafx.config import Options
from lorafx.frame import fake_value
from lorafx.graph_nodes import call_function


@dataclass(frozen=True)
class FactorSite:
    """One adapter at one module, as it was rewritten: x (…, in_features) to y (…, out_features)."""

    path: str
    in_features: int
    out_features: int
    rank: int

    def __str__(self) -> str:
        name = self.path or "(root)"
        return f"{name}: {self.in_features} -> {self.out_features}, rank {self.rank}"


@dataclass(eq=False)
class PeftContext:
    """What the passes share.

    Attributes:
        options: `lowering` and `max_edits` are read.
        sites: what each new op stands for; printed by `PeftRecord.lines`.
        left: terms that stay as PEFT wrote them, with the reason.
    """

    options: Options
    graph_module: fx.GraphModule
    sites: dict[fx.Node, FactorSite] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        values = [fake_value(node) for node in self.graph_module.graph.nodes]
        self.fake_mode = detect_fake_mode([value for value in values if isinstance(value, Tensor)])
        self.edits_left = self.options.max_edits

    @property
    def reference(self) -> bool:
        """The ops run as they are, in plain aten."""
        return self.options.lowering == "reference"

    def take_edit(self) -> bool:
        """True while the budget of `Options.max_edits` lasts; each True uses one up."""
        if self.edits_left is None:
            return True
        self.edits_left -= 1
        return self.edits_left >= 0

    def call(self, graph: fx.Graph, target: Any, args: tuple[Any, ...], **kwargs: Any) -> fx.Node:
        """`call_function` in this graph's fake mode."""
        assert self.fake_mode is not None
        return call_function(self.fake_mode, graph, target, args, **kwargs)
