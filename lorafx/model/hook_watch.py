"""Forward hooks that users register on the modules of a model, after its graphs were captured.

Dynamo traces the hooks that a module has, and guards on them. On a module without any it guards on
nothing, so graphs know nothing of a hook that comes later. No call walks the tree: torch numbers
the hooks of a process one after another, so a call compares one number: `HookWatch` for calls of
`lorafx.compile`, `LaterHooks` in a guard of Dynamo's where users compile the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lorafx.model.attachment import MARKS
from lorafx.model.sites import Site


def hooks_of(module: nn.Module) -> Iterator[tuple[int, Mapping[int, Any]]]:
    """The number of each hook around the module's forward that is no mark, and where it is kept."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in hooks.items():
            if not isinstance(hook, MARKS):
                yield number, hooks


class LaterHooks:
    """Whether others have registered hooks on some modules since this was made. Hooks that they
    take away are not looked for."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._seen = RemovableHandle.next_id
        self._known = self._numbers()

    @property
    def none(self) -> bool:
        """Whether there are none. One comparison while nobody registers hooks anywhere."""
        now = RemovableHandle.next_id
        if self._seen != now:
            if self._numbers() != self._known:
                return False
            self._seen = now
        return True

    def _numbers(self) -> list[int]:
        return [number for module in self._modules for number, _ in hooks_of(module)]


class HookWatch:
    """The hooks of others on the modules of one model.

    Attributes:
        around: whether those of `root` itself run around its graphs; those of a site are traced.
        state: 0 with the hooks that were there at first; another number whenever there are others.
    """

    def __init__(self, root: nn.Module, sites: Sequence[Site]) -> None:
        self._root = root
        self.around = all(site.module is not root for site in sites)
        self._states = itertools.count(1)
        self._own = frozenset[int]()
        self._first = self._current = self._look()
        self.state = 0

    def look(self) -> int:
        """The state now."""
        if self._seen != RemovableHandle.next_id or any(
            number not in hooks for number, hooks in self._kept
        ):
            self._take(self._look() - self._own)
        return self.state

    def take_over(self) -> None:
        """What a call has registered is the model's own, and its graphs know of it. transformers
        does so in the first call that asks for hidden states."""
        if self._seen != RemovableHandle.next_id:
            self._own |= self._look() - self._current

    def _take(self, found: frozenset[int]) -> None:
        if found != self._current:
            self._current = found
            self.state = 0 if found == self._first else next(self._states)

    def _look(self) -> frozenset[int]:
        self._seen = RemovableHandle.next_id
        modules = (m for m in self._root.modules() if m is not self._root or not self.around)
        self._kept = [found for module in modules for found in hooks_of(module)]
        return frozenset(number for number, _ in self._kept)
