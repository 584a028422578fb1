"""All entries of a program, compiled when they are first called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from lorafx.errors import CaptureError
from lorafx.model.attachment import Attachment
from lorafx.model.changes_watch import hooks_of
from lorafx.model.keywords import takes
from lorafx.model.replaced_methods import forward_of
from lorafx.program.frame import PER_REQUEST, SlotForm
from lorafx.runtime.entry import Entry
from lorafx.runtime.gates import form_of_names
from lorafx.runtime.session import Session
from lorafx.torch_internals.dynamo import any_global_hook

if TYPE_CHECKING:  # imported where used: with the first graph
    from lorafx.runtime.tiers import Tiers


class CompiledForwards:
    """The entries of a session, made when they are first needed. `attachment` is that of the marks
    on the model."""

    def __init__(self, session: Session, attachment: Attachment) -> None:
        self.session = session
        self.made: dict[tuple[Any, ...], Entry] = {}
        #: Answers calls eagerly until there are graphs; None where each call waits for its graph.
        #: Assigned by lorafx.api, before any entry is made.
        self.tiers: Tiers | None = None
        self.attachment: Final = attachment

    @property
    def model(self) -> nn.Module:
        return self.session.program.model

    def of(
        self,
        module: nn.Module,
        *,
        slots: SlotForm = PER_REQUEST,
        packed: bool = False,
        method: MethodType | None = None,
    ) -> Entry:
        """The compiled forward, or another method, of `module`: the model or a part of it that is
        called directly. A new entry is made if the forward has been replaced."""
        name = "forward" if method is None else method.__name__
        function = forward_of(module) if method is None else method
        if slots == PER_REQUEST and not packed:
            slots = form_of_names(self.session.requests.names)
        key = id(module), slots, packed, name
        entry = self.made.get(key)
        if entry is None or entry.function != function:
            shape: dict[str, Any] = {"slots": slots, "packed": packed}
            entry = Entry(self.session, module, function, name, **shape, tiers=self.tiers)
            self.made[key] = entry
        return entry

    def in_place(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, a compiled one of the model, inside of what users put in the place of the
        compiled model's (`Session.patched`), which is given the names of a call that has any."""
        session, patched = self.session, self.session.patched
        if patched is None:
            return forward
        requests, named = session.requests, dict[str, Any]()
        if requests.is_plain and takes(patched, "adapter_names"):
            named = {"adapter_names": list(requests.names)}

        @functools.wraps(patched)
        def call(*args: Any, **kwargs: Any) -> Any:
            running = session.running._replace(inner=forward)
            return session.note(running, functools.partial(patched, *args, **named, **kwargs))

        return call

    def whole(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's call with a compiled `forward`: hooks run around what `in_place` returns."""
        model, session, run = self.model, self.session, self.in_place(forward)
        if not session.program.hook_watch.around or not (any(hooks_of(model)) or any_global_hook()):
            return run
        return functools.partial(session.replacements.replacing, [(model, "forward", run)], model)

    @property
    def detached(self) -> bool:
        """Whether the marks were removed from the model."""
        return not self.attachment.rollback

    def check_attached(self) -> None:
        """Raise CaptureError if the model was detached."""
        if self.detached:
            raise CaptureError("this model was detached; call lorafx.compile again")
