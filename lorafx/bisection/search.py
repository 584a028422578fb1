"""`lorafx.bisect`: from wrong outputs to the responsible pass and site.

    y[b] = f(x; W + s·B A of names[b])[b]    compared with    the graphs after each pass

The first pass whose graphs give other outputs is wrong. If a pass is right, nodes that exist before
and after it have equal values; from the first that differs the search goes back, through the nodes
that the pass made, to the site.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.adapter_store.names import BASE
from lorafx.capture.driver import TOLERANCE, difference
from lorafx.capture.record import Stage
from lorafx.compiled_model.compiled import CompiledModel, compiled_of
from lorafx.errors import BatchError, ConfigError
from lorafx.inspection.report import Report, text_table
from lorafx.ownership.flow import module_path
from lorafx.passes.match import Match
from lorafx.passes.provenance import Provenance
from lorafx.runtime.example_inputs import named_inputs
from lorafx.runtime.replay import Replay, Run, recorded, replayed
from lorafx.torch_internals.graph_parts import tree_leaves

#: A node and the index of a result, None for all.
Source = tuple[fx.Node, int | None]


@dataclass(frozen=True)
class Divergence:
    """Where values first differ.

    Attributes:
        paths: the sites; several if one node computes them together.
        node, where: the node with the difference, its module and source line.
        error: max |got − want| / max(1, max |want|) of that node's value.
        behind: whether the node only uses the site's result.
    """

    paths: tuple[str, ...]
    node: str
    where: str
    error: float
    behind: bool = False

    def __str__(self) -> str:
        sites = ", ".join(self.paths) or "no site"
        seen = "behind it, at" if self.behind else "at"
        return f"{sites}: {seen} node {self.node}{self.where}, difference {self.error:.3g}"


@dataclass(frozen=True)
class StageError:
    """`error`, max |got − want| / max(1, max |want|), of outputs after a pass, run operator by
    operator."""

    name: str
    error: float


@dataclass(frozen=True)
class Bisection(Report):
    """The result of `lorafx.bisect`.

    Attributes:
        served: the error of the model as served.
        stages: errors by pass from `provenance` on, in order.
        first: the first pass with errors over the tolerance, if any.
        notes: what was not checked, and why.
    """

    tolerance: float
    served: float
    stages: tuple[StageError, ...]
    first: str | None = None
    site: Divergence | None = None
    notes: tuple[str, ...] = ()

    @property
    def heading(self) -> str:
        if self.first is None:
            return "no difference above tolerance"
        where = "" if self.site is None else f"; first site {self.site}"
        return f"first wrong after: {self.first}{where}"

    def facts(self) -> list[str]:
        return [
            "reference: W + ΔW merged into the model's own modules, in eager mode, each row its "
            f"adapter's; tolerance {self.tolerance:.1g}; as served {self.served:.3g}"
        ]

    def table(self) -> list[str]:
        rows = (
            (stage.name, f"{stage.error:.3g}", "ok" if stage.error <= self.tolerance else "over")
            for stage in self.stages
        )
        return text_table(("after", "error", ""), rows)

    def notes_as_lines(self) -> list[str]:
        return [f"note: {note}" for note in self.notes]


def bisect(
    model: Any,
    inputs: Mapping[str, Any] | Sequence[Any],
    adapter_names: Sequence[str | None],
    *,
    tolerance: float | None = None,
) -> Bisection:
    """Find the first pass, then the first site, at which a compiled model's outputs are wrong.

    The reference is W + ΔW of each row's adapter, merged into the modules and run in eager mode;
    weights are restored bit for bit. The graphs are captured again and run operator by operator
    after each pass from `provenance` on, the first that knows rows; if these are right and the
    outputs are not, the lowering is wrong. Graphs in service are unaffected, and other calls wait.
    The search needs twice the memory of the graph's values.

    Args:
        model: a model from `lorafx.compile`.
        inputs: the arguments of a call, by name or in order.
        adapter_names: an adapter for each request, None for the base; no sums.
        tolerance: the largest acceptable relative error; default: by dtype, 1e-4 for float32,
            2e-2 for float16, 6e-2 for bfloat16.

    Returns:
        A `Bisection`; `first` is None if nothing is wrong.

    Raises:
        ConfigError: not a compiled model, a merged adapter, or a sum of adapters.
        BatchError: `adapter_names` does not fit the batch, or no output has a row for each request.
        MatchError: an adapter cannot be merged, so there is no reference.

    It also raises the call's own errors.
    """
    compiled = compiled_of(model)
    if compiled is None:
        raise ConfigError(
            f"bisect() takes a model from lorafx.compile, and this is a {type(model).__name__}"
        )
    names = _checked_names(compiled, adapter_names)
    roles = compiled.entry(compiled._orig_mod).roles
    named = named_inputs(roles, inputs)
    rows = roles.rows(roles.spread(named))
    if rows != len(names):
        raise BatchError(
            f"{len(names)} adapter_names for a batch of {rows} requests; give one for each request"
        )
    want = _reference(compiled, named, names)
    if not want:
        raise BatchError(
            "no output of this call is a floating-point tensor with a row for each request in "
            "dimension 0, so there is nothing to compare"
        )
    if tolerance is None:
        tolerance = max(TOLERANCE.get(leaf.dtype, 1e-4) for leaf in want)
    return _Search(compiled, named, names, want, tolerance).run()


def _checked_names(compiled: CompiledModel, names: Sequence[Any]) -> list[str | None]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ConfigError(f"adapter_names must be a list of names, got {names!r}")
    if compiled.merged is not None:
        raise ConfigError(f"{compiled.merged!r} is merged; call unmerge() before bisect()")
    for name in names:
        if name is not None and not isinstance(name, str):
            raise ConfigError(
                f"bisect() takes names of adapters, not sums of them ({name!r}): there is nothing "
                "to merge as a reference. Give each adapter of the sum by itself"
            )
        if name is not None and name != BASE:
            compiled._session.store.check_known(name)
    return [None if name == BASE else name for name in names]


def _reference(
    compiled: CompiledModel, inputs: Mapping[str, Any], names: Sequence[str | None]
) -> list[Tensor]:
    """The outputs, each row computed with its adapter merged. Raises MatchError if an adapter
    cannot be merged."""
    outputs: dict[str | None, list[Tensor]] = {}
    with compiled._session.lock, compiled.disable_adapter():
        for name in dict.fromkeys(names):
            if name is not None:
                compiled.merge(name)
            try:
                outputs[name] = _outputs(compiled._orig_mod, inputs, len(names))
            finally:
                if name is not None:
                    compiled.unmerge()
    by_leaf = zip(*(outputs[name] for name in names), strict=True)
    return [torch.stack([leaf[row] for row, leaf in enumerate(leaves)]) for leaves in by_leaf]


def _outputs(
    call: Callable[..., Any], inputs: Mapping[str, Any], rows: int, **kwargs: Any
) -> list[Tensor]:
    """The tensors of a call's result with requests in dimension 0. Inputs are copied, since calls
    write into caches."""
    with torch.no_grad():
        result = call(**copy.deepcopy(dict(inputs)), **kwargs)
    return [
        leaf.detach().clone()
        for leaf in tree_leaves(result)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[:1] == (rows,)
    ]


@dataclass
class _Search:
    compiled: CompiledModel
    inputs: Mapping[str, Any]
    names: list[str | None]
    want: list[Tensor]
    tolerance: float

    def run(self) -> Bisection:
        notes: list[str] = []
        self.compiled._session.compile_for(self._call)  # or eager mode would answer
        served = self._error()
        first, site = None, None
        with replayed(self.compiled._entries) as replay:
            start = Provenance.name if Provenance.name in replay.names else Match.name
            checked = replay.names[replay.names.index(start) :]
            errors = []
            for replay.current in checked:
                errors.append(StageError(replay.current, self._error()))
            wrong = [stage.name for stage in errors if stage.error > self.tolerance]
            if wrong and wrong[0] == start:
                first = start
                earlier = ", ".join(replay.names[1 : replay.names.index(start)])
                notes.append(f"earlier passes cannot be told apart from {start}: {earlier}")
            elif wrong:
                first = wrong[0]
                before = self._runs(replay, checked[checked.index(first) - 1])
                site = between(before, self._runs(replay, first), self.tolerance)
            elif served > self.tolerance:
                first = f"lowering ({self.compiled._session.program.options.lowering})"
                notes.append(
                    "the graphs after all passes are right, run operator by operator. "
                    "Options(plan={path: 'aten'}) takes single sites out of the generated code, "
                    "Options(passes={'outline': False}) compiles each layer by itself"
                )
        return Bisection(self.tolerance, served, tuple(errors), first, site, tuple(notes))

    def _call(self) -> list[Tensor]:
        return _outputs(self.compiled, self.inputs, len(self.names), adapter_names=self.names)

    def _error(self) -> float:
        """The largest error of an output; padded tokens are left out if there is a mask (B, T)."""
        mask = self.inputs.get("attention_mask")
        worst = 0.0
        for got, want in zip(self._call(), self.want, strict=True):
            if isinstance(mask, Tensor) and got.shape[:2] == want.shape[:2] == mask.shape:
                got, want = got[mask.bool()], want[mask.bool()]
            worst = max(worst, difference(got, want))
        return worst

    def _runs(self, replay: Replay, name: str) -> list[Run]:
        runs: list[Run] = []
        with replay.running(name, lambda stage, values: recorded(stage, values, runs)):
            self._call()
        return runs


# --- the first site ---


def between(before: Sequence[Run], after: Sequence[Run], tolerance: float) -> Divergence | None:
    """The first difference between runs of the same calls, in common nodes or else in results."""
    for good, bad in zip(before, after, strict=False):
        pairs = [(node.name, node) for node in bad.graph.nodes]
        pairs += [(was.name, node) for was, node in zip(good.returned, bad.returned, strict=False)]
        for name, node in pairs:
            if name in good.values and node.name in bad.values:
                error = difference(bad.values[node.name], good.values[name])
                if error > tolerance:
                    return _first_site(node, good, bad, error)
    return None


def _first_site(node: fx.Node, good: Run, bad: Run, error: float) -> Divergence:
    """The site of a wrong value: among the pass's new nodes, else the node's, else an operand's."""
    names = {former.name for former in good.graph.nodes}

    def existed(source: fx.Node) -> bool:
        return source.name in names

    sources = list(_sources(node, None))
    new = [source for source in sources if not (existed(node) and existed(source[0]))]
    paths = _nearest_sites(new, bad.stage, existed) or bad.stage.paths(node)
    behind = not paths
    if behind:
        paths = _nearest_sites(new or sources, bad.stage, lambda _: False)
    return Divergence(paths, node.name, _where(node), error, behind and bool(paths))


def _nearest_sites(
    starts: Sequence[Source], stage: Stage, ends: Callable[[fx.Node], bool]
) -> tuple[str, ...]:
    """Sites of the nearest node backwards, up to nodes where `ends`; of a pack the part's site."""
    pending, seen = deque(starts), {node for node, _ in starts}
    while pending:
        node, index = pending.popleft()
        paths = stage.paths(node)
        if paths:
            return paths[index : index + 1] if index is not None and index < len(paths) else paths
        if ends(node):
            continue
        for source in _sources(node, index):
            if source[0] not in seen:
                seen.add(source[0])
                pending.append(source)
    return ()


def _sources(node: fx.Node, index: int | None) -> Iterator[Source]:
    """The operands of result `index` of a node."""
    if node.target is getitem:
        source: Any = node.args[0]
        yield source, int(node.args[1])  # type: ignore[arg-type]
        return
    for source in node.all_input_nodes:
        yield source, index if len(node.all_input_nodes) == 1 else None


def _where(node: fx.Node) -> str:
    path = module_path(node)
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    source = [line for line in lines if line.strip("^~ ")]
    return (f" in {path}" if path else "") + (f" (`{source[-1]}`)" if source else "")
