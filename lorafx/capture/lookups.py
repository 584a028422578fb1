"""Indices that a graph looks up in tables, checked before the graph runs.

    index = f(inputs of the graph)        0 ≤ index < entries of the table

Generated code checks an index where it reads the table, on all threads of a CPU at once, and an
error there ends the process. So what a call's own tensors and sizes make an index of is computed
once more, on the host, and refused by name: token ids, positions, types of tokens, labels, places
in a static cache. `lorafx.capture.lookup_search` has which, and has the graph itself check the
others. Generated code goes on checking all indices, so none reads what is no table's.

Tensors of a GPU are not looked at: the host would wait for it. There torch's own assertion remains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from lorafx.capture.tracking import untracked
from lorafx.kernels.ops.checked_index import refuse_outside


class Value(NamedTuple):
    """A value that is known when the graph runs: of an input, or of a step, which follow them."""

    number: int


class TableSize(NamedTuple):
    """A size: that of dimension `dim` of an input, or without one the input itself."""

    position: int
    dim: int | None


@dataclass(frozen=True)
class Step:
    """One operation on the way to an index; a method is a name."""

    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, values: Sequence[Any]) -> Any:
        """Its value, by those before it."""
        function, args = self.function, [_filled(item, values) for item in self.args]
        kwargs = {name: _filled(item, values) for name, item in self.kwargs.items()}
        if isinstance(function, str):
            function, args = getattr(args[0], function), args[1:]
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Lookup:
    """One index into one dimension of a table.

    Attributes:
        index: the number of its value.
        size: of the dimension.
        negative: whether -size is the first entry.
        ignored: a value that stands for no entry.
        table: how to name the table.
        name: how to name an entry of the index, as `refuse_outside` takes it.
    """

    index: int
    size: int | TableSize
    negative: bool
    ignored: int | None
    table: str
    name: str

    def check(self, index: Tensor, inputs: Sequence[Any]) -> None:
        """Raise OutOfRangeError where an entry of `index` is none of the table's."""
        size = self.size
        if isinstance(size, TableSize):
            source = inputs[size.position]
            size = int(source if size.dim is None else source.shape[size.dim])
        refuse_outside(index, size, self.negative, self.ignored, self.table, self.name)


@dataclass(frozen=True)
class Lookups:
    """What one graph looks up, as plain data, which is saved with the graph.

    Attributes:
        items: what is computed for it and what is looked at, in this order: a step that looks
            something up itself comes behind its own lookup.
    """

    items: tuple[Step | Lookup, ...] = ()

    def check(self, inputs: Sequence[Any]) -> None:
        """Raise OutOfRangeError where an index is outside of its table."""
        values = list(inputs)
        for item in self.items:
            if isinstance(item, Lookup):
                item.check(values[item.index], inputs)
            else:
                values.append(item.run(values))

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The graph behind these checks."""
        if not self.items:
            return compiled

        def run(*arguments: Any) -> Any:
            untracked(lambda _: self.check(arguments))
            return compiled(*arguments)

        return run


def _filled(item: Any, values: Sequence[Any]) -> Any:
    if isinstance(item, Value):
        return values[item.number]
    if isinstance(item, (tuple, list)):
        return type(item)(_filled(part, values) for part in item)
    if isinstance(item, slice):
        return slice(*(_filled(part, values) for part in (item.start, item.stop, item.step)))
    return item
