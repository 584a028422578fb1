"""Shortcuts: savings by private parts of torch that change no answer and may be off.

They are on where torch is a release of a tested version. `Options.shortcuts`, or the variable
LORAFX_SHORTCUTS, chooses others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from lorafx.errors import ConfigError, nearest
from lorafx.progress import LOG
from lorafx.torch_internals import versions

VARIABLE = "LORAFX_SHORTCUTS"


@dataclass(frozen=True)
class Shortcut:
    """What is done without it, and what it saves (docs/compile_time.md, docs/performance.md)."""

    replaces: str
    gains: str


SHORTCUTS = {
    "stamps": Shortcut(
        replaces="AOTAutograd traces every layer",
        gains="about a third of the first call at 32 layers",
    ),
    "needless_guards": Shortcut(
        replaces="all of Dynamo's guards on marks are checked before each call",
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
}


def fault() -> str | None:
    """Why shortcuts are off by default on the installed torch; None where they are on."""
    version = versions.installed("torch") or ""
    # An alpha of a tested version is not what was tested.
    release = re.fullmatch(r"[\d.]+(\+.*)?", version) is not None
    tested = release and versions.torch_minor() in versions.TORCH
    return None if tested else f"torch {version} is untested"


@cache
def _tested() -> bool:
    why = fault()
    if why is not None:
        LOG.info("shortcuts are off: %s", why)
    return why is None


def checked(setting: str | Sequence[str], what: str) -> frozenset[str] | None:
    """The shortcuts in a setting; None for "proved"; ConfigError for unknown names."""
    if setting in ("proved", "off"):
        return None if setting == "proved" else frozenset()
    names = [setting] if isinstance(setting, str) else list(setting)
    for name in names:
        if name not in SHORTCUTS:
            raise ConfigError(
                f'{what} must be "proved", "off", or names of {", ".join(SHORTCUTS)}; got {name!r}'
                f"{nearest(str(name), SHORTCUTS)}"
            )
    return frozenset(names)


def chosen(setting: str | Sequence[str] = "proved") -> frozenset[str]:
    """The shortcuts that are on; ConfigError as `checked`, also for the variable."""
    names, _ = _named(setting)
    if names is None:
        return frozenset(SHORTCUTS if _tested() else ())
    return names


def states(setting: str | Sequence[str] = "proved") -> dict[str, str]:
    """For each shortcut "on", or why it is off."""
    names, by = _named(setting)
    if names is None:
        return dict.fromkeys(SHORTCUTS, fault() or "on")
    return {name: "on" if name in names else f"switched off by {by}" for name in SHORTCUTS}


def _named(setting: str | Sequence[str]) -> tuple[frozenset[str] | None, str]:
    """The names in a setting, or in the variable in its place, and where they were found."""
    names = checked(setting, option := "Options.shortcuts")
    if names is None and (text := os.environ.get(VARIABLE)):
        parts = [part.strip() for part in text.split(",")]
        return checked(parts[0] if len(parts) == 1 else parts, VARIABLE), VARIABLE
    return names, option


@cache
def gave_up(name: str, reason: str) -> None:
    """Log, once for each reason, that a shortcut was not taken where it might have been."""
    LOG.info("the shortcut %r gave up: %s; %s", name, reason, SHORTCUTS[name].replaces)
