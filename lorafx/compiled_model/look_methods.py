"""The methods of `CompiledModel` that say what lorafx made of the model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from lorafx.capture.record import GraphRecord
from lorafx.errors import LorafxWarning, some
from lorafx.inspection.explanation import Explanation, explained
from lorafx.inspection.profile import Profile, profiled
from lorafx.inspection.replay import MadeCall, captured_again
from lorafx.inspection.report import written_into
from lorafx.inspection.viewer.dump import Dump
from lorafx.inspection.why import Why, why
from lorafx.runtime.example_inputs import as_call

if TYPE_CHECKING:
    from lorafx.compiled_model.compiled import CompiledModel
    from lorafx.runtime.session import Session


class LookMethods:
    """The part of `CompiledModel` that looks inside."""

    _session: Session
    _last_calls: dict[str, MadeCall]
    _capturing_calls: list[MadeCall]
    model: nn.Module

    def explain(self) -> Explanation:
        """A report of sites, banks, adapters, graphs, packs, row maps, plan and refusals as they
        are now: `json()` has its values, and `str()` is text. It waits for running calls."""
        with self._session.lock:
            return explained(self._session)

    def why(
        self,
        path: str,
        adapter: str | None = None,
        *,
        inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    ) -> Why:
        """What became of the module at `path` (also one that only adapters use, such as q_proj of a
        packed qkv_proj): whether it carries LoRA and by which rule, what an adapter has for it, in
        which graphs it is and how, and what refuses it.

        With `adapter` it also says which keys of the file are for the module, the norm of ΔW and by
        how much the adapter changes what the module returns: ‖delta‖ / ‖y‖ in one eager run of the
        model with this adapter for all requests, on `inputs`, the arguments of a call, or on the
        last batch if that is still there. `str()` is text, `json()` has the values.

        Raises:
            ConfigError: there is no such module; the error names the nearest paths.
            UnknownAdapterError: the adapter is not loaded.

        With `inputs` it also raises what a call raises.
        """
        call = None if inputs is None else as_call(inputs)
        session = self._session
        session.refuse_running("why()")
        with session.lock:
            made = self._last_calls.get("forward")
            return why(session, path, adapter, call, made and made.arguments)

    def profile(
        self,
        inputs: Mapping[str, Any] | Sequence[Any],
        adapter_names: Sequence[str | None],
        *,
        calls: int = 10,
    ) -> Profile:
        """Measure where the time of a call goes, site by site, beside the byte floor.

        The graphs are captured once more, and their operators run one by one under torch.profiler:
        those of the base's product and of LoRA are the kernels that serve. `calls` calls are
        measured, after one that compiles. The call as it is served is timed too. Other calls wait.

        Raises BatchError if no request has an adapter, ConfigError if `calls` is not positive, and
        what a call raises.
        """
        compiled = cast("CompiledModel", self)
        compiled._entries.check_attached()
        return profiled(compiled, inputs, list(adapter_names), calls)

    def dump(self, folder: str | os.PathLike[str]) -> Path:
        """Write the graphs, before and after each pass, as text and as diffs, with the code that
        was generated for them, `explain.txt`, and `index.html`, which shows all of it in a browser
        (docs/look_inside.md).

        The calls that captured them, and the last one, are made once more for that, operator by
        operator, with ones for arguments that are gone. Of graphs whose calls cannot be made again
        (they had a cache, say) only the generated code is written, and a warning says so. Raises
        ConfigError if the folder cannot be made, or written to.
        """
        target, unseen = Path(folder), list[str]()
        with written_into(target), self._session.lock:
            dump = Dump(target, self._session.program)
            for record in self._with_stages():
                unseen += [] if record.stages else [record.title]
                dump.add(record)
            dump.write(self.explain())
        if unseen:
            warnings.warn(
                f"{target} has no stages of {some(unseen)}, because the calls that captured these "
                "cannot be made again: LORAFX_DUMP, or Options(dump=...), writes graphs as they "
                "are compiled",
                LorafxWarning,
                stacklevel=2,
            )
        return target

    def _with_stages(self) -> list[GraphRecord]:
        """The records of the graphs, with the stages of those whose calls can be made again."""
        records = self._session.backend.records
        calls = [*self._capturing_calls, *self._last_calls.values()] if records else []
        again = captured_again(cast("CompiledModel", self), calls)
        found = []
        for record in records:
            alike = (
                other for other in again if (other.form, other.lora) == (record.form, record.lora)
            )
            same = next(alike, None)
            if same is not None:
                again.remove(same)
                record = replace(
                    record, stages=same.stages, sizes=same.sizes, outlined=same.outlined
                )
            found.append(record)
        return found

    def __repr__(self) -> str:
        lines = explained(self._session, quick=True).summary
        ways = "explain() says all, why(path) what became of a module, dump(folder) writes graphs"
        inside = [*lines, f"base model: {type(self.model).__module__}, as cm.model", ways]
        return "\n".join(["CompiledModel(", *(f"  {line}" for line in inside), ")"])
