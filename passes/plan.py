"""plan (provisional): aten."""
from dataclasses import dataclass
from lorafx.strategy import ATEN, choose
@dataclass(frozen=True)
class Plan:
    name: str = "plan"
    required: bool = False
    def run(self, gm, ctx):
        for node in ctx.states: choose(ctx, node, ATEN)
        return 0
