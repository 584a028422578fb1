"""At lorafx's entrances, whatever fails because of another torch becomes one error.

Imports of private names raise it by themselves (`private_names`). A name that is read later, or
takes other arguments, raises an AttributeError or a TypeError somewhere below.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lorafx.errors import UnsupportedVersionError
from lorafx.torch_internals import versions

_OWN = __name__.partition(".")[0]
#: Folders whose code calls private names with arguments of its own, not with a user's.
_GROUND = tuple(
    f"{_OWN}.{folder}."
    for folder in (
        *("torch_internals", "capture", "passes", "kernels", "program", "ownership", "model"),
        *("bisection", "weights"),
    )
)
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
    frames = [frame for frame, _ in traceback.walk_tb(raised.__traceback__)]
    for depth, frame in enumerate(reversed(frames)):
        if directly and depth > 1:
            return False
        # The innermost code that is not torch's decides.
        module = f"{frame.f_globals.get('__name__', '')}."
        if module.startswith(_GROUND):
            return True
        if not module.startswith(_CALLED) or module.startswith(_OF_MODELS):
            return False
    return False
