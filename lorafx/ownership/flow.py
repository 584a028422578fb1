"""The state of a propagation, and helpers of rules.

A rule (node, flow) -> Label reads the labels of its inputs through `flow`, and returns
`flow.lost(node, why)` where it cannot prove a label.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps

import sympy
import torch
from torch import fx

from lorafx.op_arguments import operand
from lorafx.ownership.labels import Digit, Label, Mixed, One, Own, Single
from lorafx.ownership.runs import RowRun, Runs
from lorafx.ownership.symbolic import ONE, BatchSymbols, Shape, Sizes, divide, is_multiple
from lorafx.torch_internals.graph_parts import OpOverload

Rule = Callable[[fx.Node, "Flow"], Label]


class Flow:
    """Labels and digits of the nodes seen so far. `batch` is B as a sympy expression.

    Args:
        copies: a site of a shared value may have a copy of it for each request.
        withheld: sites that may not; `copied_sites` are those that have.
        assume: labels may rest on run-time checks of the nodes in `fits`.
        picks: inputs (N,) whose values are indices of requests, used as `perm`.
    """

    def __init__(
        self,
        batch: BatchSymbols,
        copies: bool = True,
        withheld: frozenset[fx.Node] = frozenset(),
        assume: bool = False,
        picks: Iterable[fx.Node] = (),
    ) -> None:
        self.sizes = Sizes(batch)
        self.batch = self.sizes.batch
        self.labels: dict[fx.Node, Label] = {}
        self.digits: dict[fx.Node, Digit] = {}
        self.inverses: dict[fx.Node, fx.Node] = {}
        self.copies, self.withheld = copies, withheld
        self.copied_sites: list[fx.Node] = []
        self.assume = assume
        self.picks = frozenset(picks)
        self.fits: list[fx.Node] = []

    def label(self, arg: object) -> Single:
        """The label of an argument; None for constants and numbers."""
        label = self.labels.get(arg) if isinstance(arg, fx.Node) else None
        if isinstance(label, tuple):
            return next((output for output in label if isinstance(output, Mixed)), None)
        return label

    def digit(self, arg: object) -> Digit | None:
        return self.digits.get(arg) if isinstance(arg, fx.Node) else None

    def shape(self, arg: object) -> Shape:
        """Sizes of a tensor argument; () for numbers."""
        value = arg.meta.get("val") if isinstance(arg, fx.Node) else None
        return self.sizes.shape(value) if isinstance(value, torch.Tensor) else ()

    def size(self, arg: object) -> sympy.Expr | None:
        """An integer argument (a number or a SymInt node) as an expression."""
        return self.sizes.of(arg)

    def numbers(self, args: Iterable[object]) -> Shape:
        """Integer arguments as expressions; () unless all are integers."""
        sizes = [self.size(arg) for arg in args]
        return tuple(size for size in sizes if size is not None) if None not in sizes else ()

    def whole(self, size: sympy.Expr, label: Own) -> bool:
        """Whether `size` is a whole number of the label's periods rows·B."""
        return is_multiple(size, label.rows * self.batch)

    def positions(self, label: Single, size: sympy.Expr, rows: sympy.Expr) -> Runs | None:
        """The positions of `size` entries with this label, of which `rows` are a request's; None if
        they are not known without a vector of the graph."""
        if isinstance(label, One):
            return Runs((RowRun(label.request * rows, size, sympy.S.Zero),))
        if not isinstance(label, Own) or label.rows != rows:
            return None
        if label.perm is None:
            return Runs((RowRun(sympy.S.Zero, size),))
        return label.perm if isinstance(label.perm, Runs) else None

    def only(self, runs: Runs, rows: sympy.Expr, *, one_period: bool = False) -> int | None:
        """The request of all these positions, if it is one; `one_period`: they are below rows·B."""
        run = runs.runs[0]
        if len(runs.runs) > 1 or not runs.complete:
            return None
        if run.step == 0:
            request = divide(run.start, rows)
            return int(request) if request is not None and request.is_Integer else None
        ends, bound = (run.start, run.at(run.size - 1)), ONE if one_period else self.batch
        if not all(n.is_Integer for n in (*ends, rows, bound)):
            return None
        first, last = (int(end) // int(rows) for end in ends)
        if first != last or first < 0:
            return None
        return first if one_period else first % int(bound)

    def placed(self, dim: int, rows: sympy.Expr, runs: Runs) -> Single:
        """The simplest label of entries along `dim` at these positions."""
        request, first = self.only(runs, rows), runs.runs[0]
        if request is not None:
            return One(request)
        label = Own(dim, rows)
        whole = len(runs.runs) == 1 and self.whole(first.start, label)
        if whole and first.step == ONE and self.whole(first.size, label):
            return label
        in_turn = [RowRun(b * rows, first.size, sympy.S.Zero) for b in range(len(runs.runs))]
        if len(in_turn) == self.batch and in_turn == list(runs.runs):
            return Own(dim, first.size)
        return Own(dim, rows, runs)

    def lost(self, node: fx.Node, why: str) -> Mixed:
        return Mixed(f"{operator_name(node)}: {why} ({place(node)})")

    def agree(self, node: fx.Node, labels: Iterable[Single]) -> Single:
        """The common label of operands that meet index by index; None is neutral."""
        joined: Single = None
        for label in labels:
            if isinstance(label, Mixed):
                return label
            if label is None or label == joined:
                continue
            if joined is not None:
                return self.lost(node, f"operands disagree, {joined} and {label}")
            joined = label
        return joined

    def broadcast(self, node: fx.Node, args: Iterable[object], ndim: int) -> Single:
        """The common label of operands broadcast, right-aligned, to `ndim` dimensions."""
        return self.agree(node, [self.aligned(arg, ndim) for arg in args])

    def aligned(self, arg: object, ndim: int) -> Single:
        """An operand's label in the dimensions of a broadcast result."""
        label = self.label(arg)
        if not isinstance(label, Own):
            return label
        return label.at(label.dim + ndim - len(self.shape(arg)))


def called_by(node: fx.Node) -> object:
    """The operator of a node without its overload."""
    return getattr(node.target, "overloadpacket", None)


def outputs(node: fx.Node) -> Sequence[torch.Tensor | None]:
    """The fake tensors of a node's outputs."""
    value = node.meta.get("val")
    return value if isinstance(value, (tuple, list)) else [value]


def each_output(node: fx.Node, label: Single) -> Label:
    value = node.meta.get("val")
    return (label,) * len(value) if isinstance(value, (tuple, list)) else label


def of_owned(rule: Callable[[fx.Node, Flow, Own], Label]) -> Rule:
    """A rule of the first operand's label if owned; other labels pass to each output."""

    @wraps(rule)
    def by_label(node: fx.Node, flow: Flow) -> Label:
        label = flow.label(operand(node))
        return rule(node, flow, label) if isinstance(label, Own) else each_output(node, label)

    return by_label


def wrap(dim: int, ndim: int) -> int:
    """`dim` counted from the front."""
    return dim % ndim if ndim else 0


def wrap_all(dims: object, ndim: int) -> set[int]:
    """A schema's dim list as positions; None and () mean every dimension."""
    if isinstance(dims, int):
        return {wrap(dims, ndim)}
    if dims is None or not isinstance(dims, Sequence) or len(dims) == 0:
        return set(range(ndim))
    return {wrap(d, ndim) for d in dims}


def operator_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, OpOverload):
        return target.name()
    return getattr(target, "__name__", None) or repr(target)


def place(node: fx.Node) -> str:
    """A node's origin: its name, innermost module and source line."""
    parts = [f"node {node.name}"]
    if path := module_path(node):
        parts.append(f"in {path}")
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    files = [i for i, line in enumerate(lines) if line.startswith(("File ", "# File"))]
    if files:
        source = lines[files[-1] : files[-1] + 2]
        parts.append("at " + ": ".join(line.removeprefix("# ") for line in source))
    return ", ".join(parts)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward made `node`, or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        return plain_path(path)
    return ""


#: The traced module, by any local name.
_ROOT = re.compile(r"^L\['\w+'\]")


@functools.lru_cache(maxsize=4096)
def plain_path(path: str) -> str:
    """Dynamo's module path as a dotted path: `L['self']._modules['model']` -> `model`."""
    text = _ROOT.sub("", path).replace(".__dict__['_modules']", "._modules")
    text = text.replace("._modules[", ".[").replace("['", ".")
    text = text.replace('["', ".").replace("']", "").replace('"]', "").replace("..", ".")
    return text.strip(".")
