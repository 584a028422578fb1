"""C++ compilers run on while AOTAutograd and Dynamo do what is left to do for a graph.

    Inductor      imports what it generated, which begins g++ for each kernel    g++ ...
    AOTAutograd   wraps it; Dynamo makes code and guards, which grows with layers    ...
    here          the end of Dynamo's conversion: the kernels are waited for        done

Inductor itself waits in the import. As long as the conversion runs, Dynamo holds its lock and has
kept nothing of the frame: whoever calls the graph finds it ready, a compiler that fails is an error
of the conversion, and the frame is captured anew in the next call.

Without a conversion that waits (`torch.compile` around users' own code) all is as Inductor has it,
and so is it in a process that compiles nothing beside (`TORCHINDUCTOR_COMPILE_THREADS=1`).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import currentframe
from typing import Any, ParamSpec, TypeVar

from lorafx.capture.failures import in_lowering
from lorafx.captured_frame import traced_as_now
from lorafx.viewer.stages import Span

P = ParamSpec("P")
T = TypeVar("T")


class _Kernel:
    """Stands for a kernel in the module that calls it, until it is there. Inductor may run a part
    of a graph to choose between two: then it waits by itself."""

    def __init__(self, module: dict[str, Any], name: str, future: Any) -> None:
        self._module, self._name, self._future = module, name, future

    def wait(self) -> Callable[..., Any]:
        kernel: Callable[..., Any] = self._future.result()
        self._module[self._name] = kernel
        return kernel

    def __call__(self, *arguments: Any) -> Any:
        return self.wait()(*arguments)


@dataclass
class _Conversion:
    """What one conversion of a frame waits for, and what is to be done then."""

    kernels: list[tuple[str, list[Span], _Kernel]] = field(default_factory=list)
    compiled: list[Callable[[], None]] = field(default_factory=list)
    failed: list[Callable[[], None]] = field(default_factory=list)

    def wait(self) -> None:
        from torch._inductor.exc import InductorError

        try:
            for lowering, spans, kernel in self.kernels:
                start = time.perf_counter()
                with in_lowering(lowering):
                    try:
                        kernel.wait()
                    except Exception as error:  # as Inductor raises it
                        raised = InductorError(error, currentframe())
                        raise raised.with_traceback(error.__traceback__) from None
                    finally:
                        spans.append(Span(lowering, start, time.perf_counter()))
        except BaseException:
            for undo in self.failed:
                undo()
            raise
        for tell in self.compiled:
            tell()


class _Local(threading.local):
    conversion: _Conversion | None = None


_LOCAL = _Local()


def kernels_awaited(convert: Callable[P, T]) -> Callable[P, T]:
    """Dynamo's conversion of a frame, and the wait for all kernels that it has begun."""

    @functools.wraps(convert)
    def converted(*args: P.args, **kwargs: P.kwargs) -> T:
        before = _LOCAL.conversion
        _LOCAL.conversion = own = _Conversion()
        try:
            result = convert(*args, **kwargs)
        except Exception:
            own.wait()  # what is kept of the graph may serve another
            raise
        finally:
            _LOCAL.conversion = before
        own.wait()
        return result

    return converted


@contextmanager
def kernels_left(lowering: str, spans: list[Span]) -> Iterator[None]:
    """Inside, Inductor does not wait for kernels in C++, if the conversion that runs will.

    Args:
        lowering: what a compiler that fails is told as.
        spans: get the time of the wait.
    """
    conversion = _LOCAL.conversion
    if conversion is None:
        yield
        return
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import LambdaFuture

    wait = AsyncCompile.wait

    def leave(self: AsyncCompile, scope: dict[str, Any]) -> None:
        if _LOCAL.conversion is conversion:  # not in another thread
            for name, value in list(scope.items()):
                # Those of other compilers name the task of another process.
                if isinstance(value, LambdaFuture) and value.future is None:
                    scope[name] = kernel = _Kernel(scope, name, value)
                    conversion.kernels.append((lowering, spans, kernel))
        wait(self, scope)

    AsyncCompile.wait = leave  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCompile.wait = wait  # type: ignore[method-assign]


def when_compiled(compiled: Callable[[], None], failed: Callable[[], None]) -> None:
    """Call the one as soon as the kernels of the graph that is converted are there, or the other
    if a compiler fails."""
    if _LOCAL.conversion is None:
        compiled()
        return
    traced = traced_as_now()

    def tell() -> None:
        with traced:
            compiled()

    _LOCAL.conversion.compiled.append(tell)
    _LOCAL.conversion.failed.append(failed)
