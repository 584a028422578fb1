"""Failures of compilers become errors of lorafx, which name the failing part, the graph and the way
out.

AOTAutograd and Dynamo wrap errors or check their class, so an error passes through them unchanged,
with a note of the part that failed, and is converted outside of Dynamo.
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
_SHOWN = 400  # characters of the compiler's message; the error's cause has all of it


@dataclass(frozen=True)
class _FailedPart:
    name: str
    error: type[LorafxError]
    way_out: str


@contextmanager
def failing_in(part: str, error: type[LorafxError], way_out: str) -> Iterator[None]:
    """Notes on exceptions that `part` failed; `explained` makes an `error` of them."""
    try:
        yield
    except Exception as raised:
        if not hasattr(raised, _NOTE):
            setattr(raised, _NOTE, _FailedPart(part, error, way_out))
        raise


def lorafx_error_in(raised: BaseException) -> LorafxError | None:
    """The error of lorafx that an error of Dynamo or Inductor wraps, if any."""
    wrapped: list[BaseException | None] = [*chain(raised)[1:]]
    if isinstance(raised, TorchDynamoException):  # of what was raised inside of a trace
        wrapped.append(raised.__context__)
    return next((item for item in wrapped if isinstance(item, LorafxError)), None)


def explained(raised: BaseException, model: str, base: str = "") -> LorafxError | None:
    """lorafx's error for the failure of a compiler on a graph of `model`; None for an error of the
    model or its arguments. `base` is a sentence about calls without an adapter."""
    errors = chain(raised)
    part = next((getattr(item, _NOTE) for item in errors if hasattr(item, _NOTE)), None)
    if part is None and not _is_dynamo_failure(raised):
        return None
    version = unsupported(errors[-1], directly=True)
    if version is not None:
        return UnsupportedVersionError(f"{version}. {base}".rstrip())
    part = part or _FailedPart("Dynamo", CaptureError, KEEP_OUT)
    text = " ".join(str(errors[-1]).split())
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    if isinstance(errors[-1], OSError) and ".so" in text:
        shown += "; delete that library, which a killed process may have left half written"
    return part.error(
        f"{part.name} failed on a graph of {model}: {type(errors[-1]).__name__}: {shown} (torch "
        f"{installed('torch')}). To serve it nevertheless, {part.way_out}. {base}".rstrip()
    )


def chain(raised: BaseException) -> list[BaseException]:
    """The error, and the errors that it wraps, from the outermost to the innermost."""
    errors = [raised]
    while isinstance(inner := getattr(errors[-1], "inner_exception", None), BaseException):
        if inner in errors:
            break
        errors.append(inner)
    return errors


def _is_dynamo_failure(raised: BaseException) -> bool:
    # An operator that refuses its arguments is an error of the model.
    of_model = (TorchRuntimeError, ObservedException)
    return isinstance(raised, TorchDynamoException) and not isinstance(raised, of_model)
