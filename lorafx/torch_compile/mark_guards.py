"""Dynamo's guards on marks in frames of an attached model's own forward.

Dynamo guards everything that it read from a mark, some thirty guards per site and call
(`lorafx.capture.needless_guards`). Here any model of the class runs the same code, so what says
whose marks they are has to stay: all guards on the first mark, which name its runtime, and with it
whether an adapter is active. The other marks below the same `self` are those of the same model, as
long as its modules are where they were. Graphs of calls with adapters compare the weights of each
call for that (`lorafx.capture.bound_inputs`), and guards on marks whose bank is still loaded stay.
Hooks that users register beside marks are noticed by one guard for all modules: to guard the hooks'
dictionary of each took 20 µs a call at 224 sites.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from lorafx.capture.bound_inputs import BoundInputs
from lorafx.capture.needless_guards import FrameGuards
from lorafx.model.changes_watch import LaterHooks
from lorafx.model.marks import RowMark
from lorafx.program.program import Program
from lorafx.torch_internals.compat import add_function_guard
from lorafx.torch_internals.frames import (
    frame_guards,
    guard_local,
    keep_frame_guards,
    names_of_frame,
)

_KEY, _ACTIVE = ".runtime._key", ".runtime.active"


def drop_guards_of_attached(program: Program, bound: BoundInputs | None) -> None:
    """For a frame whose `self` is the model. `bound`: the inputs that its graph does not load, in
    a call with adapters."""
    found = FrameGuards(frame_guards(), names_of_frame())
    _drop_marks(found, program, bound)
    found.drop_classes()
    modules = found.drop_hooks_of_marked()
    keep_frame_guards(found.remaining())
    _guard_later_hooks(program, modules)


def _drop_marks(found: FrameGuards, program: Program, bound: BoundInputs | None) -> None:
    """All but the first of the model's own, but for those whose bank is loaded."""
    own = {name: mark for name, mark in found.marks.items() if mark.runtime is program.runtime}
    named = set(found.places)
    # Dynamo guards what it reads once of objects that many places hold, such as the runtime.
    said = [name for name in own if name + (_KEY if program.runtime.active else _ACTIVE) in named]
    if not said:
        return
    banks = set() if bound is None else {id(group.bank) for group, _ in bound.banks}
    unloaded = {
        name
        for name, mark in own.items()
        if not program.runtime.active or isinstance(mark, RowMark) or id(mark.bank) in banks
    }
    found.drop_marks(unloaded - {said[0]})


def _guard_later_hooks(program: Program, modules: Sequence[nn.Module]) -> None:
    """For a frame whose `self` is the model: have Dynamo guard that nobody registers hooks on these
    modules."""
    if not modules:
        return
    hooks = LaterHooks(modules)
    program.bindings.append(hooks)
    held = weakref.ref(hooks)  # Dynamo keeps some guards for ever

    def no_later_hooks(_: Any) -> bool:
        hooks = held()
        return hooks is not None and hooks.none

    def make(builder: Any, guard: Any) -> None:
        add_function_guard(builder.get_guard_manager(guard), no_later_hooks)

    guard_local("self", make)
