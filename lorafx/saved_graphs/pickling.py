"""Pickles of what belongs to one program: what the process has already is named, not copied.

a site, a group, the program, a module    its place in the program
names that each process chooses           what stands for them (`PortableNames`)
tensors                                   refused: a graph holds none of the model's numbers
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorafx.program.program import Program
from lorafx.saved_graphs.fingerprints import Undescribed
from lorafx.torch_internals.operators import DispatchKeySet

#: Names that Dynamo and lorafx choose anew in each process, by what stands for them in files.
PortableNames = Mapping[str, str]

#: The key of the slots that the program's marks read, the global that holds the compiled graph, the
#: one that holds the built-in functions. `<module x>` is a global that holds Python's module x.
SLOTS, GRAPH, BUILTINS = "<slots>", "<graph>", "<builtins>"


def to_stand_ins(names: PortableNames) -> PortableNames:
    """What to rename names to for a file."""
    return {name: stand_in for stand_in, name in names.items()}


def renamed(text: str, names: PortableNames) -> str:
    """`text`, which is one of the names or an expression with them in it."""
    if text in names:
        return names[text]
    for before, after in names.items():
        if before in text:  # in expressions names are keys, in quotes: G['name']
            text = text.replace(repr(before), repr(after))
    return text


def dump(value: object, program: Program, names: PortableNames) -> bytes:
    """The pickle of `value`.

    Raises:
        Undescribed: it holds a tensor. Others, from `pickle`, for what cannot be pickled.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, program, names).dump(value)
    return buffer.getvalue()


def load(data: bytes, program: Program, names: PortableNames) -> Any:
    """What was pickled, with the program's own objects in their places."""
    return _Unpickler(io.BytesIO(data), program, names).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, program: Program, names: PortableNames) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._names = to_stand_ins(names)
        self._places: dict[int, tuple[str, Any]] = {
            id(program): ("program", None),
            id(program.runtime): ("runtime", None),
            id(program.model): ("module", ""),
        }
        for path, module in program.model.named_modules():
            self._places[id(module)] = "module", path
        for kind, items in (("site", program.sites), ("group", program.groups)):
            self._places.update((id(item), (kind, index)) for index, item in enumerate(items))

    def persistent_id(self, value: Any) -> tuple[str, Any] | None:
        if isinstance(value, str):
            text = renamed(value, self._names)
            return None if text == value else ("text", text)
        if id(value) in self._places:
            return self._places[id(value)]
        if isinstance(value, (Tensor, nn.Module)):
            raise Undescribed(f"a {type(value).__name__} in the graph's own data")
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, DispatchKeySet):
            return DispatchKeySet.from_raw_repr, (value.raw_repr(),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, program: Program, names: PortableNames) -> None:
        super().__init__(file)
        self._program, self._names = program, names

    def persistent_load(self, place: tuple[str, Any]) -> Any:
        kind, where = place
        program = self._program
        if kind == "text":
            return renamed(where, self._names)
        if kind == "site":
            return program.sites[where]
        if kind == "group":
            return program.groups[where]
        if kind == "module":
            return program.model.get_submodule(where)
        return program if kind == "program" else program.runtime
