"""What Dynamo's sources lead to, such as `L['self'].layers[0].scale`."""

from __future__ import annotations

import functools
from types import CodeType
from typing import Any

from torch._guards import ChainedSource, Source

from lorafx.capture.replay_arguments import NotAlike

#: What a source leads to that another one begins with.
BASE = "base"


@functools.lru_cache(maxsize=4096)
def _step(template: str) -> CodeType:
    """How a source leads on from the one that it begins with, as code."""
    return compile(template.format(BASE), "<source>", "eval")


def step_of(source: ChainedSource) -> CodeType | None:
    """Code that leads on to `source` from what it begins with, `BASE`; None where only Dynamo can
    tell."""
    if type(source).get_value is not ChainedSource.get_value:
        return None
    return _step(source._name_template)


class FrameScope:
    """What sources lead to, in the frame that is being converted.

    Attributes:
        globals: what code of `step_of` is evaluated in.
    """

    def __init__(self, tx: Any) -> None:
        root = tx.output.root_tx
        self.globals = {"G": root.f_globals, "L": root.f_locals}
        self._locals: dict[str, Any] = {}
        self._known: dict[Source, Any] = {}

    def value(self, source: Source) -> Any:
        """Raises NotAlike where only Dynamo can tell."""
        try:
            return self._value(source)
        except Exception as error:
            raise NotAlike(f"{type(error).__name__}: {error}") from error

    def _value(self, source: Source) -> Any:
        """What `Source.get_value` gives, which compiles its expression each time."""
        if source in self._known:
            return self._known[source]
        step = step_of(source) if isinstance(source, ChainedSource) else None
        if step is None or not isinstance(source, ChainedSource):
            return source.get_value(self.globals, self._locals, self._known)
        value = eval(step, self.globals, {BASE: self._value(source.base)})
        self._known[source] = value
        return value
