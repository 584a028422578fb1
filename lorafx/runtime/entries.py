"""The compiled forwards of a model in service, each made when it is first asked for."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from lorafx.errors import CaptureError
from lorafx.model.marks import Attachment
from lorafx.runtime.entry import Entry
from lorafx.runtime.replaced_methods import forward_of
from lorafx.runtime.session import Session


class CompiledForwards:
    """The entries of one session. `made` are those that there are; `attachment` put the marks on
    the model of a `CompiledModel`."""

    def __init__(self, session: Session, attachment: Attachment | None = None) -> None:
        self.session = session
        self.made: dict[tuple[Any, ...], Entry] = {}
        self._attachment = attachment

    @property
    def model(self) -> nn.Module:
        return self.session.program.model

    def of(
        self,
        module: nn.Module,
        *,
        per_token: bool = False,
        packed: bool = False,
        method: MethodType | None = None,
    ) -> Entry:
        """The compiled forward of `module`, which is the model or a part that is called directly,
        or another method of it. A forward that has been put in the place of another has an entry
        of its own, which takes the other's place."""
        name = "forward" if method is None else method.__name__
        function = forward_of(module) if method is None else method
        key = id(module), per_token, packed, name
        entry = self.made.get(key)
        if entry is None or not entry.compiles(function):
            entry = self.made[key] = Entry(
                self.session, module, function, name, per_token=per_token, packed=packed
            )
        return entry

    def check_attached(self) -> None:
        """Raise CaptureError where the model was detached."""
        if self._attachment is not None and not self._attachment.rollback:
            raise CaptureError("this model was detached; call lorafx.compile again")
