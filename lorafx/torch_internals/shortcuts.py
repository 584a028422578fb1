"""Shortcuts: savings by private parts of torch that change no answer and may be off.

Each is on where torch is a tested version and the private functions that it uses have a known
source. `Options.shortcuts`, or the variable LORAFX_SHORTCUTS, chooses others.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from lorafx.errors import ConfigError, nearest
from lorafx.progress import LOG
from lorafx.torch_internals import versions
from lorafx.torch_internals.entries import found

VARIABLE = "LORAFX_SHORTCUTS"


@dataclass(frozen=True)
class Shortcut:
    """What it `replaces` and `gains` (docs/compile_time.md, docs/performance.md); `reads` has the
    private names that it uses, with the first eight digits of SHA-256 of known sources."""

    name: str
    replaces: str
    gains: str
    reads: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @cached_property
    def fault(self) -> str | None:
        """Why it is not proved on the installed torch; None where it is."""
        if versions.torch_minor() not in versions.TORCH:
            return f"torch {versions.installed('torch')} is untested"
        for name, known in self.reads.items():
            if fingerprint(name) not in known:
                return f"{name} is not as it was read"
        return None


SHORTCUTS = {
    item.name: item
    for item in (
        Shortcut(
            "stamps",
            replaces="AOTAutograd traces every layer",
            gains="about a third of the first call at 32 layers",
            reads={
                "torch._subclasses.fake_tensor.in_kernel_invocation_manager": ("24e0b991",),
                "torch._functorch._aot_autograd.graph_capture.aot_dispatch_base_graph": (
                    *("275576bf", "74e94077", "925ff207", "0a61a225"),
                ),
            },
        ),
        Shortcut(
            "needless_guards",
            replaces="all of Dynamo's guards on marks are checked before each call",
            gains="a tenth of a small model's step",
            reads={"torch.nn.Module._call_impl": ("62587dee", "3dd0447c")},
        ),
        Shortcut(
            "written_back",
            replaces="a static cache that outlined layers write into is copied twice a step",
            gains="those copies",
            reads={
                "torch._functorch._aot_autograd.descriptors.InputMutationAOTOutput": ("8032fbc2",),
                "torch._inductor.lowering.copy_": ("9e9c9707", "baea9ceb"),
                "torch._inductor.lowering.mutate_to": ("1503e77c", "421500de", "c981eafc"),
            },
        ),
        Shortcut(
            "early_launches",
            replaces="a kernel that waits for the one before it starts when that has ended",
            gains="not measured",
            reads={
                "torch._inductor.codegen.wrapper.PythonWrapperCodegen.define_kernel": (
                    *("f7f93f89", "ba8cb3c4"),
                ),
            },
        ),
    )
}


def fingerprint(name: str) -> str:
    try:
        source = inspect.getsource(found(name))
    except (AttributeError, ImportError, TypeError, OSError):
        return ""
    return hashlib.sha256(source.encode()).hexdigest()[:8]


@cache
def _proved(name: str) -> bool:
    fault = SHORTCUTS[name].fault
    if fault is not None:
        LOG.info("the shortcut %r is off: %s; %s", name, fault, SHORTCUTS[name].replaces)
    return fault is None


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
    return frozenset(filter(_proved, SHORTCUTS)) if names is None else names


def states(setting: str | Sequence[str] = "proved") -> dict[str, str]:
    """For each shortcut "on", or why it is off."""
    names, by = _named(setting)
    if names is None:
        return {name: item.fault or "on" for name, item in SHORTCUTS.items()}
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
