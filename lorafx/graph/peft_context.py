"""State of one PEFT model's graph on its way through the passes that know PEFT's arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

import lorafx.kernels.factor_ops  # noqa: F401  (defines torch.ops.lorafx.factors)
from lorafx.config import Options
from lorafx.graph.graph_nodes import GraphEdits


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
class PeftContext(GraphEdits):
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
        self.look_at(self.graph_module)
        self.edits_left = self.options.max_edits

    @property
    def reference(self) -> bool:
        """The ops run as they are, in plain aten."""
        return self.options.lowering == "reference"
