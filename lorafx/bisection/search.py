"""`lorafx.bisect`: from wrong answers to the pass and the site that make them wrong.

    outputs with the graphs after match, give_out, …, outline    beside    W + ΔW, each row its own

The first pass whose graphs give other outputs is wrong, and what it did to the first value that
differs leads to the site.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lorafx.adapter_store.names import BASE
from lorafx.bisection.first_site import Run, beside, between, recorded
from lorafx.bisection.lowered import CompiledParts
from lorafx.bisection.reference import Outputs, Reference, fresh, reference
from lorafx.bisection.reproduction import write
from lorafx.bisection.result import BatchKind, Bisection, FirstSite, StageError
from lorafx.config import After
from lorafx.errors import BatchError, ConfigError, VerifyError
from lorafx.pass_order import CAPTURED, pipeline
from lorafx.reports.writing import check_room, written_into
from lorafx.serving.compiled import CompiledModel, compiled_of
from lorafx.serving.example_inputs import named_inputs
from lorafx.serving.replay import Replay, replayed

MIXED: BatchKind = "mixed"
ALONE: BatchKind = "one adapter at a time"
#: The first stage in which all uses of weights have their deltas, and the first that knows rows.
FIRST, KNOWS_ROWS = "match", "provenance"


def bisect(
    model: Any,
    inputs: Mapping[str, Any] | Sequence[Any],
    adapter_names: Sequence[str | None],
    *,
    tolerance: float | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Bisection:
    """Find the first pass, then the first site, at which a compiled model's answers are wrong.

    The reference is W + ΔW of each row's adapter, merged into the model's own modules and run in
    eager mode; weights are put back bit for bit. The model's graphs are captured once more, kept
    after each pass, and run operator by operator with the model's own weights and banks, until the
    outputs differ. Then two stages are compared node by node. Where the graphs are right and the
    answers are not, they are compiled a few times more, with values from inside as results. The
    graphs that serve stay as they are; other calls wait. It takes the memory of the graph's values
    twice.

    Args:
        model: what `lorafx.compile` returned.
        inputs: the arguments of a call, by name or in their order.
        adapter_names: an adapter for each request, None for the base; no sums.
        tolerance: the largest relative error that counts as right; None for that of
            `Options(verify="numeric")` by dtype: 1e-4 for float32, 2e-2 for float16, 6e-2 for
            bfloat16.
        folder: where a program that shows the difference is written, with model, inputs, adapters
            and passes beside it, if there is a difference. None for none.

    Returns:
        A `Bisection`; `first` is None where nothing is wrong.

    Raises:
        ConfigError: not a compiled model, an adapter is merged, a sum of adapters, `folder` is not
            empty or cannot be written to, or what would have to be written cannot be.
        BatchError: `adapter_names` is not as long as the batch, or no output is a tensor with a row
            for each request.
        MatchError: an adapter cannot be merged, so there is no reference.

    It also raises whatever the call itself raises.
    """
    compiled = compiled_of(model)
    if compiled is None:
        raise ConfigError(
            f"bisect() takes what lorafx.compile returned, and this is a {type(model).__name__}"
        )
    names = _names(compiled, adapter_names)
    target = None if folder is None else Path(folder)
    if target is not None:
        check_room(target)
        if target.exists() and any(target.iterdir()):
            raise ConfigError(f"{target} is not empty; name a folder that does not exist yet")
    roles = compiled.entry(compiled.model).roles
    named = named_inputs(roles, inputs)
    rows = roles.rows(roles.spread(named))
    if rows != len(names):
        raise BatchError(
            f"{len(names)} adapter_names for a batch of {rows} requests; give one for each request"
        )
    search = _Search.of(compiled, named, names, tolerance)
    found = search.run()
    if found.first is not None and target is not None:
        with written_into(target):
            found = replace(found, script=write(target, compiled, named, names, found))
    return found


def _names(compiled: CompiledModel, names: Sequence[Any]) -> list[str | None]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ConfigError(f"adapter_names must be a list of names, got {names!r}")
    if compiled.merged is not None:
        raise ConfigError(f"{compiled.merged!r} is merged; call unmerge() before bisect()")
    found: list[str | None] = []
    for name in names:
        if name is not None and not isinstance(name, str):
            raise ConfigError(
                f"bisect() takes names of adapters, not sums of them ({name!r}): there is nothing "
                "to merge as a reference. Give each adapter of the sum by itself"
            )
        if name is not None and name != BASE:
            compiled._session.store.check_known(name)
        found.append(None if name == BASE else name)
    return found


@dataclass
class _Search:
    compiled: CompiledModel
    inputs: Mapping[str, Any]
    names: list[str | None]
    want: Reference
    mixed: Outputs
    tolerance: float
    mask: Tensor | None

    @classmethod
    def of(
        cls,
        compiled: CompiledModel,
        inputs: Mapping[str, Any],
        names: list[str | None],
        tolerance: float | None,
    ) -> _Search:
        want = reference(compiled, inputs, names)
        mixed = Outputs.by_row(names, want.outputs)
        if not mixed.leaves:
            raise BatchError(
                "no output of this call is a floating-point tensor with a row for each request in "
                "dimension 0, so there is nothing to compare"
            )
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        tolerance = mixed.tolerance if tolerance is None else tolerance
        return cls(compiled, inputs, names, want, mixed, tolerance, mask)

    def run(self) -> Bisection:
        notes: list[str] = []
        try:
            served = self._error(MIXED)
        except VerifyError as error:  # the model compares its stages itself
            served = float("inf")
            notes.append(str(error))
        errors: list[StageError] = []
        with replayed(self.compiled) as stages:
            first, site = self._first(stages, errors)
            if first is None and served > self.tolerance:
                lowering = self.compiled._session.program.options.lowering
                first = f"lowering ({lowering})"
                notes.append(
                    "the graphs after all passes are right, run operator by operator. Options(plan="
                    "{path: 'aten'}) takes single sites out of the generated code"
                )
                parts = self._compiled_parts(stages)
                site = parts.site
                notes += parts.notes
        if first == FIRST:
            own = self.compiled._session.program.options.passes
            early = [n for n, p in own.items() if isinstance(p, After) and p.after == CAPTURED]
            if early:
                notes.append(
                    f"passes before {FIRST} cannot be told apart from it: {', '.join(early)}"
                )
        merged = "W + ΔW merged into the model's own modules, in eager mode, each row its adapter's"
        return Bisection(self.tolerance, merged, served, tuple(errors), first, site, tuple(notes))

    def _first(
        self, stages: Replay, errors: list[StageError]
    ) -> tuple[str | None, FirstSite | None]:
        """The first wrong stage and its site; `errors` gets those of all stages."""
        names = stages.names[stages.names.index(FIRST) :]
        wrong: str | None = None
        for name in names:
            stages.current = name
            errors.append(StageError(name, self._batch(name), self._error(self._batch(name))))
            if errors[-1].error > self.tolerance and wrong is None:
                wrong = name
        if wrong is None:
            return None, None
        return wrong, self._site(stages, wrong, names)

    def _compiled_parts(self, stages: Replay) -> CompiledParts:
        """What the lowering makes of the graphs in which a layer's operators stand in the graph
        itself."""
        parts = CompiledParts(stages.lowering, self.tolerance)
        stages.current, stages.runner = stages.flat, parts.run
        try:
            self._call(self.names)
        finally:
            stages.runner = None
        if not parts.notes:
            parts.notes.append(
                "compiled once more as the passes before outline left them, the graphs are right: "
                "Options(passes={'outline': False}) goes without it"
                if stages.flat != stages.names[-1]
                else "compiled once more, the graphs are right"
            )
        return parts

    def _site(self, stages: Replay, wrong: str, names: Sequence[str]) -> FirstSite | None:
        batch = self._batch(wrong)
        adapters: list[list[str | None]] = [self.names]
        if batch == ALONE:
            adapters = [[name] * len(self.names) for name in self._adapters()]
        at = names.index(wrong)
        for asked in adapters:
            after = self._recorded(stages, wrong, asked)
            if at and self._batch(names[at - 1]) == batch:
                found = between(self._recorded(stages, names[at - 1], asked), after, self.tolerance)
            else:
                found = beside(after, self._modules(asked), self.tolerance)
            if found is not None:
                return found
        return None

    def _modules(self, asked: Sequence[str | None]) -> dict[str, list[Tensor]]:
        """Results of the sites' modules for this batch, where a row is an entry of dimension 0."""
        first, *others = dict.fromkeys(asked)
        own = self.want.modules[first]
        if not others:
            return own
        found: dict[str, list[Tensor]] = {}
        for path, results in own.items():
            for at, result in enumerate(results):
                if not result.dim() or result.shape[0] != len(asked):
                    break
                joined = result.clone()
                for row, name in enumerate(asked):
                    joined[row] = self.want.modules[name][path][at][row]
                found.setdefault(path, []).append(joined)
        return found

    def _batch(self, stage: str) -> BatchKind:
        """What a stage is asked for."""
        order = self._order
        return ALONE if order.index(stage) < order.index(KNOWS_ROWS) else MIXED

    @property
    def _order(self) -> list[str]:
        passes = [item.name for item in pipeline(self.compiled._session.program.options).graph]
        return passes if KNOWS_ROWS in passes else [*passes, KNOWS_ROWS]

    def _adapters(self) -> list[str]:
        return [name for name in dict.fromkeys(self.names) if name is not None]

    def _error(self, batch: BatchKind) -> float:
        rows = len(self.names)
        if batch == MIXED:
            return self._call(self.names).error(self.mixed, self.mask)
        worst = 0.0
        for name in self._adapters():
            own = [row for row in range(rows) if self.names[row] == name]
            got, want = self._call([name] * rows), self.want.outputs[name]
            mask = None if self.mask is None else self.mask[own]
            worst = max(worst, got.rows(own).error(want.rows(own), mask))
        return worst

    def _call(self, names: Sequence[str | None]) -> Outputs:
        result = fresh(self.compiled, self.inputs, adapter_names=list(names))
        return Outputs.of(result, len(names))

    def _recorded(self, stages: Replay, name: str, asked: Sequence[str | None]) -> list[Run]:
        runs: list[Run] = []
        stages.current, stages.runner = name, lambda stage, given: recorded(stage, given, runs)
        try:
            self._call(asked)
            return runs
        finally:
            stages.runner = None
