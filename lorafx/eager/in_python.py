"""Modes of eager forwards, which are answered only where all that they compute is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from lorafx.eager.following import Following, NeedsGraph
from lorafx.model.marks import SiteMark
from lorafx.torch_internals.dynamo import never_traced
from lorafx.torch_internals.graph_parts import DisableTorchFunction, TorchFunctionMode

T = TypeVar("T")

#: What hands a tensor's memory to code outside of torch, without an operator.
_READERS = frozenset(
    (
        Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.tolist, Tensor.data_ptr,
        Tensor.untyped_storage, Tensor.storage,
    )
)  # fmt: skip
#: x.data = ..., which is no operator.
_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


class InPython(Following):
    """Functions that the model's code compiles by itself run in Python, where they are followed."""

    error = NeedsGraph
    sees_readers = True  # or its code is known

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return False

    def _unmarked(self) -> str | None:
        assert self._uses is not None
        returned = (site.path for sites in self._weights.values() for site in sites)
        paths = ", ".join([*returned, *self._uses.unmarked])
        if paths:
            return f"{paths}: its weight is returned, or used after its delta"
        return self._uses.replaced()


class WatchedInPython(InPython):
    """Code that is not known runs, so memory that leaves torch is looked at as well."""

    def run(self, action: Callable[[], T]) -> T:
        def with_readers() -> T:
            with Readers(self):
                return action()

        return super().run(with_readers)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with DisableTorchFunction():  # what the rules read is not looked at
            return super().__torch_dispatch__(func, types, args, kwargs)

    def outside(self, action: Callable[[], T]) -> T:
        with DisableTorchFunction():
            return super().outside(action)

    def marked(self, mark: SiteMark, x: Tensor, y: Tensor) -> None:
        with DisableTorchFunction():
            super().marked(mark, x, y)


class Readers(TorchFunctionMode):
    """Refuses touched sites' weights in memory that is handed out past their modules' calls."""

    def __init__(self, following: Following) -> None:
        super().__init__()
        self._following = following

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READERS and not self._following.over:
            self._following.read_outside(func.__name__, args[0])
        elif func == _SET_DATA and not self._following.over:
            self._following.note_data(args[0])
        return func(*args, **(kwargs or {}))


for _method in (
    WatchedInPython.__torch_dispatch__, WatchedInPython.outside, Readers.__torch_function__
):  # fmt: skip
    never_traced(_method.__code__)
