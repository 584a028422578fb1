"""The order of the passes over the model, which run once, before any graph.

MODEL_PASSES   model → sites, banks, marks

It imports no pass over graphs: `lorafx.compile` needs none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from lorafx.passes.alias import Alias
from lorafx.passes.attach import Attach, LoadAdapters, Read
from lorafx.passes.model_spec import MODEL_PROMISES
from lorafx.passes.pack import PackWeights
from lorafx.passes.select import Select
from lorafx.program.program import PassReport, Preparation
from lorafx.program.promises import verify


class ModelPass(Protocol):
    """One step over the model. `run` returns how many items it found or made."""

    @property
    def name(self) -> str: ...

    def run(self, model: Preparation) -> int: ...


MODEL_PASSES: tuple[ModelPass, ...] = (
    Alias(),
    Select(),
    Read(),
    Attach(),
    LoadAdapters(),
    PackWeights(),
)


def run_model_passes(
    model: Preparation, passes: Sequence[ModelPass] = MODEL_PASSES
) -> list[PassReport]:
    """Run passes over a model. If one raises, or breaks a promise, the model is restored."""
    reports: list[PassReport] = []
    try:
        for model_pass in passes:
            start = time.perf_counter()
            count = model_pass.run(model)
            seconds = time.perf_counter() - start
            notes, model.notes = tuple(model.notes), []
            reports.append(PassReport(model_pass.name, count, seconds, notes=notes))
            passed = [report.name for report in reports]
            verify(MODEL_PROMISES, model, passed, model.options)
    except BaseException:
        model.rollback.run()
        raise
    return reports
