"""`lorafx.bisect`: from wrong answers to the responsible pass and site.

    outputs with the graphs after match, give_out, …, outline    beside    W + ΔW by row

The first pass whose graphs give other outputs is wrong, and its changes to the first differing
value lead to the site.
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
from lorafx.compiled_model.compiled import CompiledModel, compiled_of
from lorafx.config import After
from lorafx.errors import BatchError, ConfigError, VerifyError
from lorafx.inspection.replay import Replay, replayed
from lorafx.inspection.report import written_into
from lorafx.pass_order import CAPTURED
from lorafx.runtime.example_inputs import named_inputs

#: The first stage with all deltas, and the first that knows rows.
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

    The reference is W + ΔW of each row's adapter, merged into the modules and run in eager mode;
    weights are restored bit for bit. The graphs are captured again and run operator by operator
    after each pass; if these are right and the answers are not, they are recompiled with inner
    values as results. Serving graphs are unaffected; other calls wait. Needs twice the memory of
    the graph's values.

    Args:
        model: a model from `lorafx.compile`.
        inputs: the arguments of a call, by name or in order.
        adapter_names: an adapter for each request, None for the base; no sums.
        tolerance: the largest acceptable relative error; default: that of
            `Options(verify="numeric")` by dtype: 1e-4 for float32, 2e-2 for float16, 6e-2 for
            bfloat16.
        folder: receives a program that shows the difference, if there is one.

    Returns:
        A `Bisection`; `first` is None where nothing is wrong.

    Raises:
        ConfigError: not a compiled model, a merged adapter, a sum of adapters, an unusable or
            non-empty `folder`, or a program that cannot be written.
        BatchError: `adapter_names` does not fit the batch, or no output has a row for each request.
        MatchError: an adapter cannot be merged, so there is no reference.

    It also raises the call's own errors.
    """
    compiled = compiled_of(model)
    if compiled is None:
        raise ConfigError(
            f"bisect() takes what lorafx.compile returned, and this is a {type(model).__name__}"
        )
    names = _names(compiled, adapter_names)
    target = None if folder is None else Path(folder)
    if target is not None:
        with written_into(target):
            full = any(target.iterdir())
        if full:
            raise ConfigError(f"{target} is not empty; name a folder that does not exist yet")
    roles = compiled.entry(compiled.model).roles
    named = named_inputs(roles, inputs)
    rows = roles.rows(roles.spread(named))
    if rows != len(names):
        raise BatchError(
            f"{len(names)} adapter_names for a batch of {rows} requests; give one for each request"
        )
    want = reference(compiled, named, names)
    mixed = Outputs.by_row(names, want.outputs)
    if not mixed.leaves:
        raise BatchError(
            "no output of this call is a floating-point tensor with a row for each request in "
            "dimension 0, so there is nothing to compare"
        )
    tolerance = mixed.tolerance if tolerance is None else tolerance
    found = _Search(compiled, named, names, want, mixed, tolerance).run()
    if target is not None and found.first is None:
        target.rmdir()
    elif target is not None:
        with written_into(target):
            found = replace(found, script=write(target, compiled, named, names, found))
    return found


def _names(compiled: CompiledModel, names: Sequence[Any]) -> list[str | None]:
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


@dataclass
class _Search:
    compiled: CompiledModel
    inputs: Mapping[str, Any]
    names: list[str | None]
    want: Reference
    mixed: Outputs
    tolerance: float

    def run(self) -> Bisection:
        notes: list[str] = []
        try:
            served = self._error("mixed")
        except VerifyError as error:  # from its own Options(verify="numeric")
            served = float("inf")
            notes.append(str(error))
        options = self.compiled._session.program.options
        with replayed(self.compiled) as replay:
            errors = self._errors(replay)
            wrong = [stage for stage in errors if stage.error > self.tolerance]
            first = wrong[0].name if wrong else None
            site = self._site(replay, errors, errors.index(wrong[0])) if wrong else None
            if first is None and served > self.tolerance:
                first = f"lowering ({options.lowering})"
                notes.append(
                    "the graphs after all passes are right, run operator by operator. Options(plan="
                    "{path: 'aten'}) takes single sites out of the generated code"
                )
                parts = self._compiled_parts(replay)
                site = parts.site
                notes += parts.notes
        if first == FIRST:
            passes = options.passes.items()
            early = [n for n, p in passes if isinstance(p, After) and p.after == CAPTURED]
            if early:
                notes.append(
                    f"passes before {FIRST} cannot be told apart from it: {', '.join(early)}"
                )
        merged = "W + ΔW merged into the model's own modules, in eager mode, each row its adapter's"
        return Bisection(self.tolerance, merged, served, tuple(errors), first, site, tuple(notes))

    def _errors(self, replay: Replay) -> list[StageError]:
        """Of all stages with all deltas. Until a stage knows rows, each adapter serves alone."""
        batch: BatchKind = "one adapter at a time"
        errors = []
        for name in replay.names[replay.names.index(FIRST) :]:
            replay.current = name
            batch = "mixed" if name == KNOWS_ROWS else batch
            errors.append(StageError(name, batch, self._error(batch)))
        return errors

    def _error(self, batch: BatchKind) -> float:
        mask = self.inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if batch == "mixed":
            return self._call(self.names).error(self.mixed, mask)
        worst = 0.0
        for name in self._adapters():
            rows = [row for row, other in enumerate(self.names) if other == name]
            got, want = self._call([name] * len(self.names)), self.want.outputs[name]
            kept = None if mask is None else mask[rows]
            worst = max(worst, got.rows(rows).error(want.rows(rows), kept))
        return worst

    def _site(self, replay: Replay, errors: Sequence[StageError], at: int) -> FirstSite | None:
        batch = errors[at].batch
        names = [self.names]
        if batch != "mixed":
            names = [[name] * len(self.names) for name in self._adapters()]
        for asked in names:
            after = self._recorded(replay, errors[at].name, asked)
            if at and errors[at - 1].batch == batch:
                before = self._recorded(replay, errors[at - 1].name, asked)
                found = between(before, after, self.tolerance)
            else:
                found = beside(after, self._modules(asked), self.tolerance)
            if found is not None:
                return found
        return None

    def _compiled_parts(self, replay: Replay) -> CompiledParts:
        """Checks the lowering of graphs without outlined layers."""
        parts = CompiledParts(replay.lowering, self.tolerance)
        with replay.running(replay.flat, parts.run):
            self._call(self.names)
        if not parts.notes:
            parts.notes.append(
                "compiled once more as the passes before outline left them, the graphs are right: "
                "Options(passes={'outline': False}) goes without it"
                if replay.flat != replay.names[-1]
                else "compiled once more, the graphs are right"
            )
        return parts

    def _modules(self, asked: Sequence[str | None]) -> dict[str, list[Tensor]]:
        """Results of the sites' modules for this batch, with rows in dimension 0."""
        first, *others = dict.fromkeys(asked)
        if not others:
            return self.want.modules[first]
        found: dict[str, list[Tensor]] = {}
        for path, results in self.want.modules[first].items():
            for at, result in enumerate(results):
                if not result.dim() or result.shape[0] != len(asked):
                    break
                joined = result.clone()
                for row, name in enumerate(asked):
                    joined[row] = self.want.modules[name][path][at][row]
                found.setdefault(path, []).append(joined)
        return found

    def _adapters(self) -> list[str]:
        return [name for name in dict.fromkeys(self.names) if name is not None]

    def _call(self, names: Sequence[str | None]) -> Outputs:
        result = fresh(self.compiled, self.inputs, adapter_names=list(names))
        return Outputs.of(result, len(names))

    def _recorded(self, replay: Replay, name: str, asked: Sequence[str | None]) -> list[Run]:
        runs: list[Run] = []
        with replay.running(name, lambda stage, given: recorded(stage, given, runs)):
            self._call(asked)
        return runs
