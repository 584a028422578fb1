"""At lorafx's entrances, whatever fails because of another torch becomes one error.

Imports of private names raise it by themselves (`private_names`). A name that is read later, or
takes other arguments, raises an AttributeError or a TypeError somewhere below.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import cast

from lorafx.errors import UnsupportedVersionError
from lorafx.torch_internals import versions
from lorafx.torch_internals.entries import handed_out

_OWN = __name__.partition(".")[0]
#: Folders whose code does little else than use private names.
_GROUND = tuple(f"{_OWN}.{folder}." for folder in ("torch_internals", "capture", "saved_graphs"))
#: Packages whose code is called with private names. Modules of torch.nn are the model's.
_CALLED = ("torch.", "triton.")
_OF_MODELS = "torch.nn."


@contextmanager
def entrance() -> Iterator[None]:
    """Turns errors of the block whose cause is another torch into UnsupportedVersionError."""
    try:
        yield
    except Exception as error:
        failure = unsupported(error)
        if failure is None:
            raise
        raise failure from error


def unsupported(raised: BaseException, *, directly: bool = False) -> UnsupportedVersionError | None:
    """The replacement of an error that another torch is the cause of, or None. `directly`: what was
    called has raised it, not code deep inside of a compiler, which may fail on the graph."""
    known = isinstance(raised, (AttributeError, TypeError, ImportError))
    if not known or not _of_private(raised, directly):
        return None
    return UnsupportedVersionError(f"{type(raised).__name__}: {raised}; {versions.way_out()}")


def _of_private(raised: BaseException, directly: bool) -> bool:
    for depth, place in enumerate(reversed(list(_places(raised.__traceback__)))):
        if directly and depth > 1:
            return False
        # The innermost code that is not torch's decides.
        module = f"{place.tb_frame.f_globals.get('__name__', '')}."
        if module.startswith(_GROUND):
            return True
        if module.startswith(f"{_OWN}."):
            return bool(_names_at(place) & handed_out())
        if not module.startswith(_CALLED) or module.startswith(_OF_MODELS):
            return False
    return False


def _places(place: TracebackType | None) -> Iterator[TracebackType]:
    while place is not None:
        yield place
        place = place.tb_next


def _names_at(place: TracebackType) -> set[str]:
    """The names in the expression that raised in this frame."""
    code = place.tb_frame.f_code
    positions = next(islice(code.co_positions(), place.tb_lasti // 2, None))
    if None in positions:
        return set()
    line, end_line, column, end_column = cast(tuple[int, ...], positions)
    source = "".join(linecache.getlines(code.co_filename))
    return {
        node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Name)
        and (line, column) <= (node.lineno, node.col_offset)
        and (node.end_lineno or 0, node.end_col_offset or 0) <= (end_line, end_column)
    }
