"""Compares the two tiers of a call, eager mode and the graph that a process beside has compiled.

    they agree                            the graph is offered
    the graph alone differs as lowered    calls stay eager
    it differs by single operators, too   one of the two is wrong: calls of that kind are refused,
                                          with the first site whose output differs

So no call gets one answer before a graph is there, and another one after. Answers agree within the
bound of their dtype (`TOLERANCE`). What draws random numbers is not compared: generated code draws
others. This module is imported in the process beside, which ends afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lorafx.capture.driver import TOLERANCE, difference
from lorafx.capture.missed import Missed
from lorafx.eager.undo import Undo
from lorafx.errors import LorafxError, ProvenanceError
from lorafx.passes.provenance import Provenance
from lorafx.program.argument_roles import tensor_leaves
from lorafx.program.program import Program
from lorafx.runtime.call import ForwardCall
from lorafx.runtime.replay import Replay, Run, options_of_replays, recorded

#: The output of each site that a call has passed, by path, in their order.
SiteOutputs = list[tuple[str, Tensor]]


#: Copies of the floating-point tensors of a result, without what is padding; None if random numbers
#: were drawn.
ComparedAnswer: TypeAlias = "list[Tensor] | None"


@dataclass(frozen=True)
class ComparedCall:
    """A call. `eagerly` runs it in eager mode, passes its result to a function, undoes all that it
    has changed, and returns what the function does; it notes the outputs of sites."""

    call: ForwardCall
    eagerly: Callable[[Callable[[Any], ComparedAnswer], SiteOutputs], ComparedAnswer]

    def verdict(self) -> tuple[str, str]:
        """("refused" or "eager", the reason) if the saved graph must not be offered, else two empty
        texts."""
        try:
            sites: SiteOutputs = []
            eager = self.eagerly(self._reader(), sites)
        except Exception:  # the serving process meets it too
            return "", ""
        try:
            graph = self._by_graph(attrgetter("load"))
        except ProvenanceError as error:  # eager mode proves it with the numbers of each call
            return "eager", f"its graph cannot serve such a batch: {error}"
        except LorafxError:  # as each call by the graph
            return "", ""
        if isinstance(graph, Missed):
            return "", ""
        bound = bound_of(self.call.session.program)
        apart = distance(eager, graph, bound)
        if apart <= 1:
            return "", ""
        lowering = self.call.session.program.options.lowering
        if self.call.base:
            return "eager", _apart(f"the graph of the base, by {lowering!r}, and eager mode", apart)
        runs: list[Run] = []
        apart = distance(eager, self._by_operator(runs), bound)
        if apart <= 1:
            return "eager", (
                f"its graph, as lowered by {lowering!r}, gives other numbers than eager mode and "
                'than the same graph run operator by operator; Options(lowering="reference") runs '
                "it so"
            )
        where = _first_site(sites, runs, bound)
        return "refused", (
            f"{_apart('eager mode and the graph of this call', apart)}, first at {where}. One of "
            "the two is wrong, so calls of this kind are refused. lorafx.bisect(cm, inputs, "
            "adapter_names) compares the graph with merged weights; if it is right, "
            'Options(start="compiled") answers by graphs alone'
        )

    def _reader(self) -> Callable[[Any], ComparedAnswer]:
        return partial(answer_of, self.call.kwargs, torch.get_rng_state())

    def _by_graph(self, conversion: Any = None) -> ComparedAnswer | Missed:
        """The answer of a graph. What it has written is then as before: a call has two of them."""
        program, read = self.call.session.program, self._reader()
        held = (*self.call.args, *self.call.kwargs.values())
        undo = Undo((program.model, *held), program.runtime.device)
        undo.note([*tensor_leaves(held), *program.buffers()])
        try:
            result = self.call.forward.run_graph(self.call, conversion)
            return result if isinstance(result, Missed) else read(result)
        finally:
            undo.run()

    def _by_operator(self, runs: list[Run]) -> ComparedAnswer:
        """The answer of the graph as `provenance` leaves it, by plain aten."""
        session = self.call.session
        session.program.options = replace(
            options_of_replays(session.program.options), lowering="reference"
        )
        replay = Replay(session)
        session.backend = replay.backend
        self.call.forward.traced.clear()
        with replay.running(Provenance.name, lambda stage, values: recorded(stage, values, runs)):
            answer = self._by_graph()
        assert not isinstance(answer, Missed)  # no conversion was chosen
        return answer


def answer_of(kwargs: Mapping[str, Any], random_state: Tensor, result: Any) -> ComparedAnswer:
    """The answer in a call's result; `random_state` is torch's before the call."""
    if not torch.equal(random_state, torch.get_rng_state()):
        return None
    mask = kwargs.get("attention_mask")
    tensors = []
    for leaf in tensor_leaves(result, objects=False):  # the padding of caches is not told apart
        if not leaf.is_floating_point() or leaf.layout is not torch.strided:
            continue
        if isinstance(mask, Tensor) and mask.dim() == 2 and leaf.shape[:2] == mask.shape:
            leaf = leaf[mask.bool()]
        tensors.append(leaf.detach().clone())
    return tensors


def bound_of(program: Program) -> float:
    """The largest `difference` that rounding explains: by the dtypes that the model computes in,
    which may be narrower than those of its results."""
    dtypes = {tensor.dtype for tensor in program.model.parameters()}
    if torch.is_autocast_enabled("cpu"):
        dtypes.add(torch.get_autocast_dtype("cpu"))
    return max((TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE), default=0.0)


def distance(eager: ComparedAnswer, graph: ComparedAnswer, bound: float = 0.0) -> float:
    """The largest difference of two answers, by the bound of its dtype, or by `bound` if that is
    larger; 0 if they are not to be compared."""
    if eager is None or graph is None:
        return 0.0
    if len(eager) != len(graph):
        return float("inf")
    pairs = zip(graph, eager, strict=True)
    return max((_distance(got, want, bound) for got, want in pairs), default=0.0)


def _distance(got: Tensor, want: Tensor, bound: float) -> float:
    if got.shape == want.shape:  # numbers that are infinite, or none, in both are equal
        odd = ~want.isfinite() & ((got == want) | (got.isnan() & want.isnan()))
        got, want = got.masked_fill(odd, 0), want.masked_fill(odd, 0)
    return difference(got, want) / max(bound, TOLERANCE.get(want.dtype, TOLERANCE[torch.float32]))


def _apart(what: str, apart: float) -> str:
    return f"{what} give numbers that differ by {apart:.2g} times what rounding explains"


def _first_site(sites: SiteOutputs, runs: Sequence[Run], bound: float) -> str:
    """The first site of eager mode whose output differs from that in the graph."""
    outputs: dict[str, list[Tensor]] = {}
    for run in runs:
        for node in run.graph.nodes:
            for path in run.stage.paths(node):
                outputs.setdefault(path, []).append(run.values[node.name])
    for path, eager in sites:
        graph = outputs.get(path)
        if not graph:
            return f"{path}, which the graph does not have"
        if _distance(graph.pop(0), eager, bound) > 1:
            return path
    missing = [path for path, left in outputs.items() if left]
    return f"{missing[0]}, which eager mode did not pass" if missing else "what follows all sites"
