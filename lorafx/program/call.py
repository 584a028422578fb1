"""What a program serves at the moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorafx.ownership.memory import Memory
from lorafx.program.roles import RoleTable


@dataclass(eq=False)
class Call:
    """The call that is running: its entry's roles and its arguments by name (None and none where
    they are not known), and whose is what it has computed so far.

    Attributes:
        tracks: what Python computes between graphs is tracked in calls that mix adapters.
        tracked: it is in this call.
    """

    roles: RoleTable | None
    named: Mapping[str, Any]
    memory: Memory
    tracks: bool = False
    tracked: bool = False


class Batch(NamedTuple):
    """The running call, and what the adapters of its batch touch. Replaced whole.

    Attributes:
        call: None where nothing runs.
        touched: canonical paths of the sites that the adapters touch.
        rescaled: those of them that they rescale (DoRA).
        shifted: those of them to whose outputs they add a bias.
        owned: those of them of whose weight they have rows of their own.
    """

    call: Call | None = None
    touched: frozenset[str] = frozenset()
    rescaled: frozenset[str] = frozenset()
    owned: frozenset[str] = frozenset()
    shifted: frozenset[str] = frozenset()


#: Nothing runs.
AT_REST = Batch()
