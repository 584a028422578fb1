"""Linears whose input a kernel may compute in the shrink, and the deltas that it adds by the way.

    y = fused_linear(x, W₁, bank₁);  h = silu(y[:, :K]) · y[:, K:];  z = fused_linear(h, W₂, bank₂)

h is a pointwise region with one reader. Where y is read by that region alone, nobody needs y with
its delta in memory: the kernel that computes h adds v₁ B₁ to what it reads of y ("deferred").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from lorafx.errors import ConfigError
from lorafx.graph.context import FUSED_OP, Context
from lorafx.graph.pointwise_region import SPLITS, NoRegion, PointwiseRegion
from lorafx.kernels.cost.cost import estimate
from lorafx.kernels.cost.prologue_cost import estimate_deferred, estimate_prologue
from lorafx.kernels.cost.work import Work
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.activation import MOST_FACTORS, Activation, Leaf, delta_place
from lorafx.kernels.triton.triton_build import AROUND
from lorafx.op_arguments import bound
from lorafx.passes.fuse.fuse_experts import region
from lorafx.program.frame import fake_value

_KEY = "lorafx_prologue"


@dataclass(frozen=True)
class Prologue:
    """What computes the input of one node.

    Attributes:
        region: its expression and leaves.
        deferred: the leaves that are LoRA nodes and whose deltas its kernel adds.
    """

    region: PointwiseRegion
    deferred: tuple[fx.Node, ...] = ()

    def leaves(self) -> Iterator[tuple[Leaf, fx.Node, fx.Node | None]]:
        """(leaf, its node, that of its ids) in the order in which the op takes them."""
        nodes = iter(self.region.inputs)
        for leaf in self.region.activation.leaves:
            yield leaf, next(nodes), next(nodes) if leaf.gathered else None

    def activation(self, deltas: dict[fx.Node, tuple[DeltaSpec, int]]) -> Activation:
        """The expression with the spec, and the planes of v, of each deferred delta."""
        leaves = []
        for leaf, node, _ in self.leaves():
            spec, planes = deltas.get(node, (None, 1))
            leaves.append(replace(leaf, delta=spec, planes=planes))
        return replace(self.region.activation, leaves=tuple(leaves))


PROLOGUE, DEFERRED = "prologue", "deferred"
#: What leaves the base product to the vendor's GEMM.
BESIDE_VENDOR = ("segments", "gemv", *AROUND)


def prologue_of(node: fx.Node) -> Prologue | NoRegion:
    """What computes the input of a fused linear, without deferred deltas."""
    if node.target is not FUSED_OP:
        return NoRegion("it is not a linear with its base product")
    found = region(node)
    return found if isinstance(found, NoRegion) else Prologue(found)


@dataclass
class Prologues:
    """Which nodes of a graph are computed so.

    Attributes:
        choices: (strategy, reason) by node, from the plan of each node by itself; changed here.
        pinned: the user's strategy by node.
        specs: of the nodes that kernels can be generated for.
        work: a node for the cost model; None where the number of rows is unknown.
    """

    ctx: Context
    choices: dict[fx.Node, tuple[str, str]]
    pinned: dict[fx.Node, str]
    specs: dict[fx.Node, DeltaSpec]
    work: Callable[[fx.Node], Work | None]

    def choose(self) -> dict[fx.Node, Prologue]:
        """The prologues by node; `choices` says "prologue" and "deferred" then.

        Raises:
            ConfigError: a pin that no kernel can follow.
        """
        found = {}
        for node in self.choices:
            prologue = self._prologue(node)
            if prologue is None:
                continue
            found[node] = prologue
            self.choices[node] = (PROLOGUE, self._reason(node, prologue))
            for source in prologue.deferred:
                self.choices[source] = (DEFERRED, self._reason(source, None))
        taken = {source for prologue in found.values() for source in prologue.deferred}
        for node, (name, _) in self.choices.items():
            if name == DEFERRED and node not in taken:
                raise ConfigError(
                    f"Options.plan pins 'deferred' for {self._names(node)}, but no linear with "
                    "the strategy 'prologue' is the only reader of its output; pin 'prologue' for "
                    "the linear that reads it, or another strategy here"
                )
        return found

    def _prologue(self, node: fx.Node) -> Prologue | None:
        wanted = self.choices[node][0] == PROLOGUE
        if node not in self.specs or not (wanted or self._is_free(node)):
            return None
        found = prologue_of(node)
        if isinstance(found, NoRegion):
            if not wanted:
                return None
            raise ConfigError(
                f"Options.plan pins 'prologue' for {self._names(node)}, but no kernel can compute "
                f"its input: {found.reason}; pin another strategy, or remove the pin"
            )
        prologue = replace(found, deferred=self._deferrable(node, found))
        return prologue if wanted or self._pays(node, prologue) else None

    def _deferrable(self, node: fx.Node, prologue: Prologue) -> tuple[fx.Node, ...]:
        """The leaves whose deltas the kernel in front of `node` can add."""
        width, found = fake_value(bound(node)["x"]).shape[-1], []
        for number, (leaf, source, ids) in enumerate(prologue.leaves()):
            spec = self.specs.get(source)
            if spec is None or ids is not None or source.target is not FUSED_OP:
                continue
            if self.choices[source][0] != DEFERRED and not self._is_free(source):
                continue
            loads = [load for load in prologue.region.activation.loads if load.leaf == number]
            same_rows = all(bound(source)[name] == bound(node)[name] for name in ("slots", "rows"))
            placed = all(delta_place(spec, load, width) is not None for load in loads)
            small = spec.max_rank <= MOST_FACTORS and spec.y_dtype == leaf.dtype
            if same_rows and placed and small and _read_inside(source, node, prologue.region):
                found.append(source)
        return tuple(found)

    def _is_free(self, node: fx.Node) -> bool:
        """Whether the plan left its base product to the vendor, and the user said nothing."""
        return node not in self.pinned and self.choices[node][0] in BESIDE_VENDOR

    def _pays(self, node: fx.Node, prologue: Prologue) -> bool:
        nodes = (node, *prologue.deferred)
        works = [work for one in nodes if (work := self.work(one)) is not None]
        if len(works) < len(nodes) or not works[0].compute_bound:
            return False  # few rows: kernels of their own base product are there for those
        apart = sum(
            estimate(work)[self.choices[one][0]].seconds
            for one, work in zip(nodes, works, strict=True)
        )
        own, *known = works
        together = estimate_prologue(own, known, _reads(prologue)).seconds
        return together + sum(estimate_deferred(work).seconds for work in known) < apart

    def _reason(self, node: fx.Node, prologue: Prologue | None) -> str:
        work = self.work(node)
        if node in self.pinned or work is None:
            return self.choices[node][1]
        if prologue is None:
            return f"modelled {estimate_deferred(work)}; the kernel that reads it adds its delta"
        others = [self.work(source) for source in prologue.deferred]
        known = [other for other in others if other is not None]
        modelled = estimate_prologue(work, known, _reads(prologue))
        return f"modelled {modelled}; its shrink computes its input"

    def _names(self, node: fx.Node) -> str:
        return ", ".join(state.site.path for state in self.ctx.states[node])


def _reads(prologue: Prologue) -> int:
    """Columns that the activation reads for each row."""
    nodes = {source for _, source, ids in prologue.leaves() if ids is None}
    return sum(int(fake_value(node).shape[-1]) for node in nodes)


def _read_inside(source: fx.Node, reader: fx.Node, region: PointwiseRegion) -> bool:
    """Whether all that is computed from `source`, sizes aside, is in the region."""
    pending, seen = [source], {source}
    while pending:
        for user in pending.pop().users:
            if user is reader or user.target is torch.ops.aten.sym_size.int or user in seen:
                continue
            if user not in region.inside and user.target not in SPLITS:
                return False
            seen.add(user)
            pending.append(user)
    return True


def note(node: fx.Node, prologue: Prologue) -> None:
    """Keep it for `lower`, which carries it out."""
    node.meta[_KEY] = prologue


def noted(node: fx.Node) -> Prologue:
    """What `note` kept."""
    found: Prologue = node.meta[_KEY]
    return found
