"""Shortcuts: optimisations by private parts of torch that change no result and can be off.

They are on if torch is a release of a tested version. `Options.shortcuts` chooses others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from lorafx.progress import LOG
from lorafx.torch_internals import versions


@dataclass(frozen=True)
class Shortcut:
    """What happens without it, and what it saves (benchmarks/results/README.md)."""

    replaces: str
    gains: str


SHORTCUTS = {
    "needless_guards": Shortcut(
        replaces="Dynamo checks marks, hooks, weights and constants before each call",
        gains="a tenth of a small model's step",
    ),
    "written_back": Shortcut(
        replaces="a static cache that outlined layers write into is copied twice a step",
        gains="those copies",
    ),
    "early_launches": Shortcut(
        replaces="a kernel that waits for the one before it starts when that has ended",
        gains="1 to 2 µs per linear on an H200",
    ),
    "compiler_ahead": Shortcut(
        replaces="the C++ compiler rests while the first graph is traced and rewritten",
        gains="10 of the 46 s of a machine's first generate, on two cores",
    ),
}


def reason_off() -> str | None:
    """Why shortcuts are off by default on the installed torch; None if they are on."""
    version = versions.installed("torch") or ""
    # An alpha of a tested version was not tested.
    release = re.fullmatch(r"[\d.]+(\+.*)?", version) is not None
    tested = release and versions.torch_minor() in versions.TORCH
    return None if tested else f"torch {version} is untested"


@cache
def _on_by_default() -> bool:
    why = reason_off()
    if why is not None:
        LOG.info("shortcuts are off: %s", why)
    return why is None


def chosen(names: Sequence[str] | None = None) -> frozenset[str]:
    """The shortcuts that are on: those of `Options.shortcuts`, or the default of this torch."""
    if names is None:
        names = tuple(SHORTCUTS) if _on_by_default() else ()
    return frozenset(names)


def states(names: Sequence[str] | None = None) -> dict[str, str]:
    """For each shortcut "on", or why it is off."""
    on, why = chosen(names), reason_off() if names is None else "switched off by Options.shortcuts"
    return {name: "on" if name in on else str(why) for name in SHORTCUTS}
