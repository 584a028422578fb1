"""`lorafx.bisect`: from wrong answers to the responsible pass and site.

    y[b] = f(x; W + s·B A of names[b])[b]    beside    outputs with the graphs after each pass

The first pass whose graphs give other outputs is wrong, and its changes to the first differing
value lead to the site.
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafx.adapter_store.names import BASE
from lorafx.adapter_store.saved import AdapterSource, opened
from lorafx.adapter_store.stored import StoredAdapter
from lorafx.bisection.first_site import CompiledParts, FirstSite, Run, between, recorded
from lorafx.capture.verify import TOLERANCE, difference
from lorafx.compiled_model.compiled import CompiledModel, compiled_of
from lorafx.config import After
from lorafx.errors import BatchError, ConfigError
from lorafx.inspection.replay import Replay, replayed
from lorafx.inspection.report import Report, Table, written_into
from lorafx.model.marks import detach
from lorafx.passes.match import Match
from lorafx.passes.provenance import Provenance
from lorafx.runtime.example_inputs import named_inputs
from lorafx.torch_internals.graph_parts import tree_leaves

_RIGHT = (
    "compiled once more as the passes before outline left them, the graphs are right: "
    "Options(passes={'outline': False}) goes without it"
)


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
        notes: what could not be checked, and why.
        script: a program that shows the difference, if wanted.
    """

    tolerance: float
    served: float
    stages: tuple[StageError, ...]
    first: str | None = None
    site: FirstSite | None = None
    notes: tuple[str, ...] = ()
    script: Path | None = None

    def derived(self) -> dict[str, Any]:
        return {"script": None if self.script is None else str(self.script)}

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

    def tables(self) -> list[Table]:
        rows = []
        for stage in self.stages:
            verdict = "ok" if stage.error <= self.tolerance else "over"
            rows.append((stage.name, f"{stage.error:.3g}", verdict))
        return [Table("", ("after", "error", ""), rows)]

    def notes_as_lines(self) -> list[str]:
        lines = [f"note: {note}" for note in self.notes]
        return lines + ([f"reproduced by: python {self.script}"] if self.script else [])


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
    after each pass from `provenance` on, the first that knows rows; if these are right and the
    answers are not, they are recompiled, cut off behind a site. Serving graphs are unaffected;
    other calls wait. Needs twice the memory of the graph's values.

    Args:
        model: a model from `lorafx.compile`.
        inputs: the arguments of a call, by name or in order.
        adapter_names: an adapter for each request, None for the base; no sums.
        tolerance: the largest acceptable relative error; default: by dtype, 1e-4 for float32,
            2e-2 for float16, 6e-2 for bfloat16.
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
    want = _reference(compiled, named, names)
    if not want:
        raise BatchError(
            "no output of this call is a floating-point tensor with a row for each request in "
            "dimension 0, so there is nothing to compare"
        )
    if tolerance is None:
        tolerance = max(TOLERANCE.get(leaf.dtype, 1e-4) for leaf in want)
    found = _Search(compiled, named, names, want, tolerance).run()
    if target is not None and found.first is None:
        target.rmdir()
    elif target is not None:
        with written_into(target):
            script = _write(target, compiled, named, names, tolerance)
            found = replace(found, script=script)
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


def _reference(
    compiled: CompiledModel, inputs: Mapping[str, Any], names: Sequence[str | None]
) -> list[Tensor]:
    """The outputs, each row of the model with its adapter merged. Raises MatchError where one
    cannot be merged."""
    found: dict[str | None, list[Tensor]] = {}
    with compiled._session.lock, compiled.disable_adapter():
        for name in dict.fromkeys(names):
            if name is not None:
                compiled.merge(name)
            try:
                found[name] = _outputs(compiled.model, inputs, len(names))
            finally:
                if name is not None:
                    compiled.unmerge()
    by_leaf = zip(*(found[name] for name in names), strict=True)
    return [torch.stack([leaf[row] for row, leaf in enumerate(leaves)]) for leaves in by_leaf]


def _outputs(
    call: Callable[..., Any], inputs: Mapping[str, Any], rows: int, **more: Any
) -> list[Tensor]:
    """The tensors of a call's result with requests in dimension 0. Inputs are copied, since calls
    write into caches."""
    with torch.no_grad():
        result = call(**copy.deepcopy(dict(inputs)), **more)
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
        served = self._error()
        first, site = None, None
        with replayed(self.compiled) as replay:
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
                parts = CompiledParts(replay.lowering, self.tolerance)
                with replay.running(replay.flat, parts.run):
                    self._call()
                site = parts.site
                notes += [
                    "the graphs after all passes are right, run operator by operator. "
                    "Options(plan={path: 'aten'}) takes single sites out of the generated code",
                    *(parts.notes or [_RIGHT]),
                ]
        return Bisection(self.tolerance, served, tuple(errors), first, site, tuple(notes))

    def _call(self) -> list[Tensor]:
        return _outputs(self.compiled, self.inputs, len(self.names), adapter_names=self.names)

    def _error(self) -> float:
        """The largest error of an output, without padding where there is a mask (B, T)."""
        mask = self.inputs.get("attention_mask")
        worst = 0.0
        for got, want in zip(self._call(), self.want, strict=True):
            if isinstance(mask, Tensor) and got.shape[:2] == want.shape[:2] == mask.shape:
                got, want = got[mask.bool()], want[mask.bool()]
            worst = max(worst, difference(got, want))
        return worst

    def _runs(self, replay: Replay, name: str) -> list[Run]:
        runs: list[Run] = []
        with replay.running(name, lambda stage, given: recorded(stage, given, runs)):
            self._call()
        return runs


_SCRIPT = '''"""Shows a difference that lorafx.bisect has found; exits with 1 where it is there."""

import sys
from pathlib import Path

import torch

import lorafx

sys.path += {paths}  # where the model's classes and passes were imported from
case = torch.load(Path(__file__).with_name("case.pt"), weights_only=False)
found = lorafx.bisect(lorafx.compile(**case["compile"]), **case["bisect"])
print(found)
sys.exit(0 if found.first is None else 1)
'''


def _write(
    folder: Path,
    compiled: CompiledModel,
    inputs: Mapping[str, Any],
    names: Sequence[str | None],
    tolerance: float,
) -> Path:
    """Write a program that shows the difference into `folder`, with the model, its options, inputs
    and adapters in case.pt beside it. Raises ConfigError for an unpicklable model or pass, or an
    adapter without file."""
    program, store = compiled._session.program, compiled._session.store
    options = {
        item.name: getattr(program.options, item.name)
        for item in fields(program.options)
        if item.name not in ("cache", "dump", "verify")
    }
    passes = [item.run for item in program.options.passes.values() if isinstance(item, After)]
    if any(
        item.__module__ == "__main__" for item in (*map(type, program.model.modules()), *passes)
    ):
        raise ConfigError(
            "what is defined in the program that runs, or in a notebook, cannot be found by "
            "another program; put models and passes into a module of their own"
        )
    model = copy.deepcopy(program.model)
    detach(model)
    case = {
        "compile": {
            "model": model,
            "lora_config": program.config,
            "adapters": {name: _adapter(store[name]) for name in names if name is not None},
            "options": {**options, "passes": dict(program.options.passes)},
        },
        "bisect": {"inputs": inputs, "adapter_names": names, "tolerance": tolerance},
    }
    try:
        torch.save(case, folder / "case.pt")
    except (pickle.PicklingError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"the case cannot be written for a reproduction ({error}): models and passes have to "
            "be at the top level of a module that can be imported"
        ) from error
    script = folder / "repro.py"
    paths = [str(Path(path).absolute()) for path in sys.path]
    script.write_text(_SCRIPT.format(paths=paths))
    return script


def _adapter(stored: StoredAdapter) -> AdapterSource:
    """The adapter with what its files hold."""
    origin = stored.origin
    source = AdapterSource(stored.source) if origin is None else origin.source
    if origin is None and not Path(stored.source).exists():
        raise ConfigError(
            f"adapter {stored.name!r} came from memory ({stored.source}); load it from a folder, "
            "so that a reproduction can have its files"
        )
    saved = opened(source)
    return replace(source, source=replace(saved, tensors=dict(saved.tensors), origin=None))
