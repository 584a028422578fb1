"""Functions under Dynamo that are traced again after an error during tracing.

Only this module makes, reads and resets Dynamo's marks on code objects, which models share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from lorafx.capture.compile_log import conversion
from lorafx.capture.missed import Missed, NoGraph
from lorafx.torch_internals.compat import capture_settings, entry_arguments, inductor_config
from lorafx.torch_internals.dynamo import (
    ConvertFrameReturn,
    FrameAction,
    FrameExecStrategy,
    ObservedException,
    Unsupported,
    calls_traced,
    check,
    innermost_fn,
    optimize,
)
from lorafx.torch_internals.frames import guard_filter
from lorafx.torch_internals.transforms import printing_ends

if TYPE_CHECKING:  # imported where used: torch may lack what it needs
    from lorafx.capture.saved_graphs.saved_graphs import SavedGraphs

#: Run a function in Python once; its callees and its next call are traced as usual.
_THIS_TIME = FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT)

#: Converts a frame of the function: its arguments are Dynamo's own conversion and that one's.
Conversion = Callable[..., ConvertFrameReturn | Missed]


class Traced:
    """`function` compiled by `backend`, with its own graphs, and in several frames where it breaks.

    Dynamo itself never traces a function again that raised during tracing. Here such a function
    runs in Python until the error has reached the caller; one that catches it stays untraced.

    Args:
        sizes_by_data: says at each capture whether to capture data-dependent sizes.
        keep_guards: selects the guards of a new graph; Dynamo then makes them twice.
        saved: graphs that other processes saved.
        saves: whether each conversion looks for saved graphs, and saves its own.
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
        saved: SavedGraphs | None = None,
        saves: bool = False,
    ) -> None:
        #: What functions raised that are not traced, until their error has reached the caller.
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
            converter._inner_convert = self._conversion_of(converter._inner_convert)
        self._name = name
        self._recompile_limit = recompile_limit
        self._symbolic = bool(dynamic)
        self._sizes_by_data = sizes_by_data
        self.saved = saved
        #: Converts the frame of `function`, in place of Dynamo, where no call asks for another.
        self.default: Conversion | None = saved.converted if saved and saves else None
        #: That of the running call: assigned by Entry.run_graph.
        self.conversion: Conversion | None = self.default
        function = _with_unshared_code(function)
        self._code = function.__code__
        self.call: Callable[..., Any] = context(function)

    def _conversion_of(self, convert: Callable[..., ConvertFrameReturn]) -> Callable[..., Any]:
        """Dynamo's conversion with lorafx's settings, except for functions that were given up."""

        @functools.wraps(convert)  # with its attributes, which Dynamo reads
        def converting(frame: Any, *args: Any, **kwargs: Any) -> ConvertFrameReturn:
            if frame.f_code in self.given_up:
                return ConvertFrameReturn(frame_exec_strategy=_THIS_TIME)
            try:
                settings = capture_settings(
                    self._recompile_limit,
                    sizes_by_data=self._sizes_by_data(),
                    symbolic=self._symbolic,
                )
                with settings, calls_traced(), conversion(self._name), printing_ends():
                    if self.conversion is None or frame.f_code is not self._code:
                        return convert(frame, *args, **kwargs)
                    converted = self.conversion(convert, frame, *args, **kwargs)
                if isinstance(converted, Missed):
                    raise NoGraph(converted)
                return converted
            except Unsupported as error:
                if isinstance(error.__cause__, ObservedException):
                    self.given_up[frame.f_code] = _raised_text(error)
                    error.frame_exec_strategy = _THIS_TIME
                raise

        return converting

    def find(self, *_: Any, **__: Any) -> Missed:
        """A conversion that makes no graph, where Dynamo has found none."""
        return Missed()

    def load(self, _: Any, frame: Any, *args: Any, **kwargs: Any) -> ConvertFrameReturn | Missed:
        """A conversion that finds a saved graph."""
        return Missed() if self.saved is None else self.saved.found(frame, args)

    def save(self, convert: Any, frame: Any, *args: Any, **kwargs: Any) -> Missed:
        """A conversion for its saved graph alone: the file, or why there is none."""
        if self.saved is None:
            return Missed("graphs of this model are not saved")

        def alone(*args: Any, **kwargs: Any) -> ConvertFrameReturn:
            with inductor_config.patch(compile_threads=1):  # its workers are another process's
                return convert(*args, **kwargs)

        self.saved.converted(alone, frame, *args, **kwargs)
        return Missed(self.saved.unsaved, self.saved.file)


def _raised_text(error: Unsupported) -> str:
    """The exception that the model raised, such as `ValueError('too many')`, from Dynamo's text."""
    begin = "raised exception "
    for line in f"{error}\n{error.__cause__}".splitlines():
        if begin in line:
            return line.partition(begin)[2]
    return str(error.__cause__)


def _with_unshared_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a code object of its own. Dynamo marks code whose frames it cannot trace, and
    modules share code: torch.nn's forwards, transformers' decorators."""
    if not isinstance(function, MethodType):
        function = innermost_fn(function)  # through wrappers of torch.compile and disable
    plain = function.__func__ if isinstance(function, MethodType) else function
    # Partials and callable objects have no frame, and torch's functions are not traced. As
    # torch.compile does, a function that calls them is traced.
    if not isinstance(plain, FunctionType) or check(plain):
        wrapped = function

        def call(*args: Any, **kwargs: Any) -> Any:
            return wrapped(*args, **kwargs)

        function = plain = call
    copy = FunctionType(
        plain.__code__.replace(co_varnames=plain.__code__.co_varnames),
        plain.__globals__,
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    copy.__kwdefaults__ = plain.__kwdefaults__
    copy.__dict__.update(plain.__dict__)
    return MethodType(copy, function.__self__) if isinstance(function, MethodType) else copy
