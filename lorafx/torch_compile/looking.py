"""`why` and `profile` of models that their users compile themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lorafx.errors import ConfigError
from lorafx.explanation.why import Why, why
from lorafx.reports.profile import Profile
from lorafx.serving.entries import Entries
from lorafx.serving.entry import Entry
from lorafx.serving.example_inputs import as_call
from lorafx.serving.profiling import profiled
from lorafx.session.requests import checked_names
from lorafx.torch_compile.attached import AttachedSession
from lorafx.torch_internals.modules import OptimizedModule


def why_attached(
    session: AttachedSession,
    path: str,
    adapter: str | None,
    inputs: Mapping[str, Any] | Sequence[Any] | None,
) -> Why:
    """As `CompiledModel.why`. Nobody keeps note of calls of such a model, so the change of an
    adapter is measured on `inputs` alone."""
    call = None if inputs is None else as_call(inputs)
    session.refuse_running("why()")
    with session.lock:
        return why(session, path, adapter, call, None, partial(_in_eager_mode, session))


def _in_eager_mode(
    session: AttachedSession, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Run the marked model with this adapter for all requests."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), session.block(name):
        session.program.model(*args, **kwargs)


class _Calls:
    """Calls of an attached model as `lorafx.compile` would serve them, by code of their own: what
    the user's torch.compile has captured stays as it is."""

    def __init__(self, session: AttachedSession) -> None:
        self._session = session
        self._entries = Entries(session)
        self.model = session.program.model
        self.sites = session.program.sites

    def entry(self, module: nn.Module) -> Entry:
        return self._entries.of(module)

    def __call__(self, *, adapter_names: Sequence[Any], **inputs: Any) -> Any:
        run = partial(self.entry(self.model), **inputs)
        return self._session.call(run, checked_names(adapter_names))


def profile_attached(
    session: AttachedSession,
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    names: Sequence[str | None],
    calls: int,
) -> Profile:
    """As `CompiledModel.profile`. `model` is what torch.compile returned, whose calls are timed as
    they are served.

    Raises:
        ConfigError: it is the marked model itself, and not compiled.
    """
    if not isinstance(model, OptimizedModule) and model._compiled_call_impl is None:
        raise ConfigError(
            f"profile() times a model as it is served, and this {type(model).__name__} is not "
            'compiled; give it what torch.compile(model, backend="lorafx") returned'
        )
    session.refuse_running("profile()")

    def serve(**given: Any) -> None:
        with torch.no_grad(), session.block(names):
            model(**given)

    return profiled(_Calls(session), inputs, names, calls, serve)
