"""A call of a compiled forward, as a value that its tiers answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from lorafx.capture.missed import Missed
from lorafx.program.argument_roles import RoleTable
from lorafx.runtime.session import Session

#: Chooses a conversion of the traced function (`Traced`).
Choice = Callable[[Any], Any]


class Forward(Protocol):
    """A compiled forward as a call has it (`lorafx.runtime.entry.Entry`)."""

    @property
    def session(self) -> Session: ...

    @property
    def name(self) -> str: ...

    @property
    def roles(self) -> RoleTable: ...

    @property
    def looping(self) -> tuple[str, ...]: ...

    @property
    def traced(self) -> dict[Any, Any]: ...

    def in_python(self, *args: Any, **kwargs: Any) -> Any: ...

    def run_graph(self, call: ForwardCall, conversion: Choice | None = None) -> Any: ...


class ForwardCall(NamedTuple):
    """A call whose batch is set. `base`: graphs of the base answer it, not those with adapters."""

    forward: Forward
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    base: bool

    @property
    def session(self) -> Session:
        return self.forward.session


#: A way in which a call is answered: its answer, or `Missed`.
Tier = Callable[[ForwardCall], Any | Missed]
