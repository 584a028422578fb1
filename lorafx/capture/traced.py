"""A function under Dynamo, and code that Dynamo would stop tracing for good: models share code
objects, and a model outlives an error. Only this module makes, reads and resets such marks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType, MethodType
from typing import Any

from lorafx.capture.told import conversion
from lorafx.torch_internals.compat import capture_settings, entry_arguments
from lorafx.torch_internals.dynamo import (
    ConvertFrameReturn,
    FrameAction,
    FrameExecStrategy,
    ObservedException,
    Unsupported,
    check,
    innermost_fn,
    optimize,
    set_code_exec_strategy,
)
from lorafx.torch_internals.frames import guard_filter
from lorafx.torch_internals.traced_calls import calls_traced

#: A function that is not compiled now runs in Python this time; what it calls, and its next call,
#: are looked at as ever.
_THIS_TIME = FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT)
#: A function that Dynamo leaves alone, with all that it calls.
_NEVER = FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP)


class Traced:
    """`function` compiled by `backend`, frame by frame where it breaks, with graphs of its own.

    Dynamo would never again trace a function that raised while it was traced: one bad request would
    leave a model without graphs. Here it runs in Python until that error has reached the caller; if
    the function gets over it, it stays untraced.

    Args:
        name: what users call the function.
        sizes_by_data: whether operators whose results' sizes depend on data are captured too, asked
            at each capture.
        keep_guards: says which of a new graph's guards are checked before each call; all where it
            is None. Dynamo makes them twice to ask.
        converted: as `convert`, its first argument, for the frame of the function itself: graphs
            that other processes compiled are tried first.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        backend: Callable[..., Any],
        *,
        name: str,
        dynamic: bool | None,
        recompile_limit: int,
        sizes_by_data: Callable[[], bool],
        keep_guards: Callable[[Sequence[Any]], Sequence[bool]] | None = None,
        converted: Callable[..., ConvertFrameReturn] | None = None,
    ) -> None:
        #: What functions raised that were given up for it.
        self.given_up: dict[CodeType, str] = {}
        context: Any = optimize(
            backend,
            dynamic=dynamic,
            guard_filter_fn=None if keep_guards is None else guard_filter(keep_guards),
            **entry_arguments(recompile_limit),
        )
        callback = getattr(context, "callback", None)  # none where Dynamo is switched off
        if callback is not None:
            converter = callback._torchdynamo_orig_backend
            converter._inner_convert = self._noting(converter._inner_convert)
        self._name = name
        self._recompile_limit = recompile_limit
        self._symbolic = bool(dynamic)
        self._sizes_by_data = sizes_by_data
        self._converted = converted
        function = _with_own_code(function)
        self._code = function.__code__
        self.call: Callable[..., Any] = context(function)

    def _noting(self, convert: Callable[..., ConvertFrameReturn]) -> Callable[..., Any]:
        """Dynamo's conversion of a frame, but for frames that were given up. Dynamo holds its lock
        meanwhile, so its settings are ours in this thread alone."""

        @functools.wraps(convert)  # with its attributes, which Dynamo asks for
        def noting(frame: Any, *args: Any, **kwargs: Any) -> ConvertFrameReturn:
            if frame.f_code in self.given_up:
                return ConvertFrameReturn(frame_exec_strategy=_THIS_TIME)
            try:
                settings = capture_settings(
                    self._recompile_limit,
                    sizes_by_data=self._sizes_by_data(),
                    symbolic=self._symbolic,
                )
                with settings, calls_traced(), conversion(self._name):
                    if self._converted is not None and frame.f_code is self._code:
                        return self._converted(convert, frame, *args, **kwargs)
                    return convert(frame, *args, **kwargs)
            except Unsupported as error:
                if isinstance(error.__cause__, ObservedException):
                    self.given_up[frame.f_code] = _what_was_raised(error)
                    error.frame_exec_strategy = _THIS_TIME
                raise

        return noting


def _what_was_raised(error: Unsupported) -> str:
    """`ValueError('too many')`, as Dynamo writes it: the error itself was never made."""
    begin = "raised exception "
    for line in f"{error}\n{error.__cause__}".splitlines():
        if begin in line:
            return line.partition(begin)[2]
    return str(error.__cause__)


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a code object that nothing else shares.

    Dynamo notes on the code object that a frame is not to be traced. One code stands behind all
    modules that torch.nn wrote the forward of, and one behind each decorator of transformers, so
    what another torch.compile gave up would not be traced here either.
    """
    if not isinstance(function, MethodType):
        function = innermost_fn(function)  # of what was compiled, or kept from it
    plain = function.__func__ if isinstance(function, MethodType) else function
    # What is no function (a partial, an object) has no frame, and torch's own functions are not
    # traced: torch.compile too puts such a call around them.
    if not isinstance(plain, FunctionType) or check(plain):
        inner = function

        def call(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

        function = plain = call
    own = FunctionType(
        plain.__code__.replace(co_varnames=plain.__code__.co_varnames),
        plain.__globals__,
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    own.__kwdefaults__ = plain.__kwdefaults__
    own.__dict__.update(plain.__dict__)
    return MethodType(own, function.__self__) if isinstance(function, MethodType) else own


def never_traced(code: CodeType) -> None:
    """Have Dynamo trace neither this function nor what it calls."""
    set_code_exec_strategy(code, _NEVER)
