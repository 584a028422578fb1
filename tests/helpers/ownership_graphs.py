"""Small functions as functional ATen graphs with symbolic sizes, and taint as the judge of labels.

Taint: run the graph on B requests, change the input of one, see which entries of which values
move. A label is contradicted when an entry moves that it says belongs to another request (for rows
behind a permutation: after both runs are put back in order).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.decomposition import select_decomp_table
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lorafx.ownership.flow import Flow
from lorafx.ownership.labels import Mixed, One, Own
from lorafx.ownership.propagate import flow_through
from lorafx.ownership.runs import Runs
from lorafx.ownership.symbolic import BatchSymbols, as_expr


def by_keyword(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        node.kwargs = dict(reversed(given.items()))
        node.args = ()


def trace(
    fn: Callable[..., Any], examples: Sequence[torch.Tensor], static: Sequence[int] = ()
) -> fx.GraphModule:
    """fn as a functional ATen graph; every size symbolic, but for the inputs in `static`."""
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    fakes = [
        mode.from_tensor(t, static_shapes=True)
        if i in static
        else mode.from_tensor(
            t, symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC] * t.dim())
        )
        for i, t in enumerate(examples)
    ]
    with torch.no_grad(), enable_python_dispatcher(), mode:
        graph = make_fx(dispatch_functionalize(fn), decomposition_table=select_decomp_table())
        return graph(*fakes)


def label_graph(gm: fx.GraphModule, seeds: Sequence[Any], *, assume: bool = False) -> Flow:
    """Propagate from one label an input; the batch is the size of the seeds' owner dimensions."""
    inputs = inputs_of(gm)
    batch = BatchSymbols.of(
        node.meta["val"].shape[seed.dim]
        for node, seed in zip(inputs, seeds, strict=True)
        if isinstance(seed, Own)
    )
    return flow_through(gm.graph, dict(zip(inputs, seeds, strict=True)), batch, assume=assume)


def output_label(flow: Flow, gm: fx.GraphModule) -> Any:
    (result,) = next(node for node in gm.graph.nodes if node.op == "output").args
    return flow.labels[result[0] if isinstance(result, (tuple, list)) else result]


FRESH = (
    torch.ops.aten.empty,
    torch.ops.aten.new_empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
)


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if getattr(n.target, "overloadpacket", None) in FRESH:
            result.zero_()  # fresh memory differs from run to run
        self.values[n] = result
        return result


def taint(
    gm: fx.GraphModule,
    flow: Flow,
    inputs: Sequence[torch.Tensor],
    changed: Sequence[torch.Tensor],
    request: int,
    requests: int,
    tolerance: float = 1e-9,
) -> list[str]:
    """Nodes whose label the two runs contradict; only `request`'s inputs differ between them."""
    before, after = Recorder(gm), Recorder(gm)
    with torch.no_grad():
        before.run(*inputs)
        after.run(*changed)
    known = _sizes(flow, before.values)
    found = []
    for node, value in before.values.items():
        if node.op != "call_function":
            continue
        label = flow.labels[node]
        many = isinstance(value, (tuple, list))
        values = value if many else [value]
        others = after.values[node] if many else [after.values[node]]
        labels = label if isinstance(label, tuple) else (label,) * len(values)
        for one, a, b in zip(labels, values, others, strict=True):
            if isinstance(a, torch.Tensor) and not isinstance(one, Mixed):
                perm = one.perm if isinstance(one, Own) else None
                if isinstance(perm, Runs):
                    orders = (_positions(perm, known),) * 2
                else:
                    orders = (before.values[perm], after.values[perm]) if perm is not None else None
                if _contradicted(one, a, b, orders, known, request, requests, tolerance):
                    found.append(f"{node.name} ({node.target}): {one}")
    return found


def _sizes(flow: Flow, values: dict[fx.Node, Any]) -> dict[sympy.Expr, sympy.Expr]:
    known = {}
    for node, value in values.items():
        fake = node.meta.get("val")
        if isinstance(fake, torch.Tensor) and isinstance(value, torch.Tensor):
            for symbol, size in zip(fake.shape, value.shape, strict=True):
                known[flow.sizes.unify(as_expr(symbol))] = sympy.Integer(size)
        elif isinstance(fake, torch.SymInt):
            known[flow.sizes.unify(as_expr(fake))] = sympy.Integer(int(value))
    return known


def _positions(runs: Runs, known: dict[sympy.Expr, sympy.Expr]) -> torch.Tensor:
    ends = [
        [int(sympy.sympify(end).xreplace(known)) for end in (r.start, r.size, r.step)]
        for r in runs.runs
    ]
    return torch.cat([start + step * torch.arange(size) for start, size, step in ends])


def _contradicted(label, a, b, orders, known, request, requests, tolerance) -> bool:
    if a.shape != b.shape:
        return True
    if label is None:
        return bool(_moved(a, b, tolerance).any())
    if isinstance(label, One):
        return label.request != request and bool(_moved(a, b, tolerance).any())
    rows, count = int(label.rows.xreplace(known)), a.shape[label.dim]
    positions = torch.arange(count)
    if orders is not None and orders[0].equal(orders[1]):
        positions = orders[0]
        if len(positions) != count:
            return True
    elif count % (rows * requests):
        return True
    elif orders is not None:
        a = a.index_select(label.dim, torch.argsort(orders[0]))
        b = b.index_select(label.dim, torch.argsort(orders[1]))
    owner = (positions // rows) % requests
    moved = _moved(a, b, tolerance).movedim(label.dim, 0).reshape(count, -1).any(1)
    return bool((moved & (owner != request)).any())


def _moved(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> torch.Tensor:
    if not a.is_floating_point():
        return a != b
    a, b = a.double(), b.double()
    scale = a.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(1.0, 1e30) if a.numel() else 1.0
    return ~((a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= tolerance * scale))


def labelled(
    fn: Callable[..., Any],
    examples: Sequence[torch.Tensor],
    seeds: Sequence[Any],
    static: Sequence[int] = (),
    *,
    assume: bool = False,
) -> tuple[Any, Flow, fx.GraphModule]:
    """(label of fn's first result, flow, graph), from one label an input."""
    gm = trace(fn, examples, static)
    flow = label_graph(gm, seeds, assume=assume)
    return output_label(flow, gm), flow, gm


def inputs_of(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def batch_of(nodes: Sequence[fx.Node], dim: int = 0) -> BatchSymbols:
    """The requests are the entries of that dimension of all of these."""
    return BatchSymbols.of(node.meta["val"].shape[dim] for node in nodes)


#: A marked linear, x of K features and y of N, and its bank.
K, N, SLOTS, RANK = 4, 6, 3, 2
WEIGHT = torch.linspace(-1, 1, K * N, dtype=torch.float64).sin().view(K, N)
BANK = (
    torch.linspace(-1, 1, SLOTS * RANK * K, dtype=torch.float64).cos().view(SLOTS, RANK, K),
    torch.linspace(-2, 1, SLOTS * RANK * N, dtype=torch.float64).sin().view(SLOTS, RANK, N),
    torch.tensor([[2], [1], [2]], dtype=torch.int32),
    torch.tensor([[1.0], [0.5], [2.0]]),
)


def lora(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """A marked linear."""
    return torch.ops.lorafx.site(x, x @ WEIGHT, *BANK, slots, [0], [0], [N], 0)
