"""A method of one of Dynamo's images, intercepted in the thread that converts a frame of ours."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _Local(threading.local):
    converts = False


class Interception:
    """Runs `instead` in the place of a method, in threads that are inside of `on`.

    The method is replaced once, and stays so: other threads, and frames of others, get what was
    there before.

    Attributes:
        image: the class of Dynamo's.
        method: the method's name.
        instead: takes the method that was there before, and what that takes.
    """

    def __init__(self, image: type, method: str, instead: Callable[..., Any]) -> None:
        self.image, self.method, self.instead = image, method, instead
        self._local, self._lock, self._installed = _Local(), threading.Lock(), False

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, this thread converts a frame of ours."""
        self._install()
        before, self._local.converts = self._local.converts, True
        try:
            yield
        finally:
            self._local.converts = before

    def _install(self) -> None:
        with self._lock:
            if self._installed:
                return
            self._installed = True
            call = getattr(self.image, self.method)

            @functools.wraps(call)  # what others have noted on it stays there
            def method(*args: Any, **kwargs: Any) -> Any:
                if self._local.converts:
                    return self.instead(call, *args, **kwargs)
                return call(*args, **kwargs)

            setattr(self.image, self.method, method)
