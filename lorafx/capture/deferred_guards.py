"""Guards on replayed layers are made when a frame's guards are asked for, and not before.

A layer has some 480 guards, of which three fifths are on marks and hooks and are dropped
(`lorafx.capture.dropped_guards`), and a fifth are on hooks that Dynamo is set not to guard. What is
dropped of a traced layer is dropped of those that are replayed from it: so it is asked of the
traced ones alone, and of what they keep a copy is made for each of the others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch._dynamo
from torch._dynamo.guards import GuardBuilder
from torch._guards import Guard, GuardsSet, Source

from lorafx.captured_frame import guard_set, put_guard_set, takes_no_guards


class Copies(Protocol):
    """The guards of a traced layer that another layer needs too."""

    @property
    def originals(self) -> Collection[Guard]:
        """Of the traced layer."""
        ...

    def copied(self, guard: Guard) -> Guard:
        """One of them, on the other layer."""
        ...


class DeferredGuards(GuardsSet):
    """The guards of a frame, with some that are made as soon as somebody looks at them."""

    def __init__(self, guards: GuardsSet) -> None:
        # As it is, with what Dynamo of this version notes beside the guards.
        self.__dict__.update(vars(guards))
        self._deferred: list[Copies] = []

    def defer(self, copies: Copies) -> None:
        self._deferred.append(copies)

    def take(self) -> list[Copies]:
        """What was deferred, which is the caller's to make from now on."""
        taken, self._deferred = self._deferred, []
        return taken

    def _complete(self) -> None:
        if taken := self.take():
            _make(self, taken)

    def __iter__(self) -> Iterator[Guard]:
        self._complete()
        return super().__iter__()

    def __len__(self) -> int:
        self._complete()
        return super().__len__()

    def __bool__(self) -> bool:
        self._complete()
        return super().__bool__()

    def __sub__(self, other: GuardsSet) -> GuardsSet:
        self._complete()
        return super().__sub__(other)

    def clear(self) -> None:
        self.take()
        super().clear()

    def get_guards_for_source(self, source: Source) -> list[Guard]:
        self._complete()
        return super().get_guards_for_source(source)

    def remove_guards_with_source(self, source: Source) -> None:
        self._complete()
        super().remove_guards_with_source(source)


def defer(copies: Copies) -> None:
    """Have the guards of the frame that is being captured include these as soon as somebody looks
    at them."""
    if takes_no_guards():
        return
    guards = guard_set()
    if not isinstance(guards, DeferredGuards):
        guards = DeferredGuards(guards)
        put_guard_set(guards)
    guards.defer(copies)


@contextmanager
def decided_on_traced() -> Iterator[None]:
    """Inside, the frame that is being captured has no guards that were deferred; afterwards those
    whose originals were not dropped inside."""
    guards = guard_set()
    taken = guards.take() if isinstance(guards, DeferredGuards) else []
    before = {id(guard): guard for guard in guards.inner}
    yield
    left = guard_set()
    after = {id(guard) for guard in left.inner}
    idle = [guard for guard in before.values() if not _is_needed(guard)]
    dropped = (before.keys() - after).union(map(id, idle))
    _make(left, taken, without=dropped)


def _make(
    guards: GuardsSet, deferred: Collection[Copies], without: Collection[int] = frozenset()
) -> None:
    """Add copies of the originals to `guards`, but for those `without`, by identity."""
    for copies in deferred:
        for guard in copies.originals:
            if id(guard) not in without:
                guards.add(copies.copied(guard), collect_debug_stack=False)


def _is_needed(guard: Guard) -> bool:
    """Whether Dynamo makes anything of a guard."""
    unguarded = torch._dynamo.config.skip_nnmodule_hook_guards
    return not (unguarded and guard.create_fn is GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT)
