"""Compiler failures as errors of lorafx: the failing part, the graph, and the way out.

AOTAutograd and Dynamo wrap errors or check their class. So an error passes unchanged, with a note
of its origin, and is converted outside Dynamo.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lorafx.errors import CaptureError, LorafxError, UnsupportedVersionError
from lorafx.torch_internals.dynamo import ObservedException, TorchDynamoException, TorchRuntimeError
from lorafx.torch_internals.versions import installed, unsupported

_NOTE = "_lorafx_failed_in"
KEEP_OUT = "use torch.compiler.disable on the functions that cannot be traced"
_SHOWN = 400  # characters of the compiler's own message; the whole of it is the cause


@dataclass(frozen=True)
class _Place:
    what: str
    error: type[LorafxError]
    way_out: str


@contextmanager
def failing_in(what: str, error: type[LorafxError], way_out: str) -> Iterator[None]:
    """Notes on exceptions where they arose; for the caller they become an `error` with a
    `way_out`."""
    try:
        yield
    except Exception as raised:
        if not hasattr(raised, _NOTE):
            setattr(raised, _NOTE, _Place(what, error, way_out))
        raise


def own_error(raised: BaseException) -> LorafxError | None:
    """lorafx's error inside an error of Dynamo or Inductor."""
    return next((item for item in chain(raised)[1:] if isinstance(item, LorafxError)), None)


def explained(raised: BaseException, model: str, base: str = "") -> LorafxError | None:
    """The lorafx error for a compiler failure on a graph of `model`; None for errors of the model
    or its arguments. `base` tells what happens to calls without an adapter."""
    errors = chain(raised)
    place = next((getattr(item, _NOTE) for item in errors if hasattr(item, _NOTE)), None)
    if place is None and not _is_of_dynamo(raised):
        return None
    version = unsupported(errors[-1], directly=True)
    if version is not None:
        return UnsupportedVersionError(f"{version}. {base}".rstrip())
    place = place or _Place("Dynamo", CaptureError, KEEP_OUT)
    text = " ".join(str(errors[-1]).split())
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    if isinstance(errors[-1], OSError) and ".so" in text:
        shown += "; delete that library, which a killed process may have left half written"
    return place.error(
        f"{place.what} failed on a graph of {model}: {type(errors[-1]).__name__}: {shown} (torch "
        f"{installed('torch')}). To serve it nevertheless, {place.way_out}. {base}".rstrip()
    )


def chain(raised: BaseException) -> list[BaseException]:
    """The error, and the errors that Dynamo and Inductor have wrapped."""
    found = [raised]
    while isinstance(inner := getattr(found[-1], "inner_exception", None), BaseException):
        if inner in found:
            break
        found.append(inner)
    return found


def _is_of_dynamo(raised: BaseException) -> bool:
    # An operator refusing its arguments is the model's error.
    models = (TorchRuntimeError, ObservedException)
    return isinstance(raised, TorchDynamoException) and not isinstance(raised, models)
