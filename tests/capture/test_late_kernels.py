"""Compilers run on while guards are made; a call still finds its graph ready, or the error."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, Case, check_mixed, error, valid
from tiny_models import FAMILIES
from toolchain import needs_compiler
from torch._dynamo.guards import CheckFunctionManager
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache, LambdaFuture
from torch._inductor.exc import CppCompileError

from lorafx.capture.late_kernels import kernels_awaited, kernels_left
from lorafx.errors import LoweringError

pytestmark = [needs_compiler, pytest.mark.usefixtures("fixed_sizes")]
NAMES = ["a1", None, "a3"]


class Libraries:
    """Those of Inductor's kernels in C++, which are loaded as soon as they are compiled.

    Attributes:
        before: is called before each.
        loaded: how many were.
    """

    def __init__(self) -> None:
        self.before: Callable[[], object] = lambda: None
        self.loaded = 0


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Libraries]:
    """Of a process with two workers, which has loaded none."""
    found, load = Libraries(), CppPythonBindingsCodeCache._load_library

    def loading(path: str, key: str) -> Any:
        found.before()
        found.loaded += 1
        return load(path, key)

    monkeypatch.setattr(CppPythonBindingsCodeCache, "_load_library", loading)
    CppPythonBindingsCodeCache.cache_clear()
    with torch._inductor.config.patch(compile_threads=2):
        yield found
    CppPythonBindingsCodeCache.cache_clear()


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Is set as soon as Dynamo makes guards of a graph."""
    begun, make = threading.Event(), CheckFunctionManager.__init__

    def making(self: Any, *args: Any, **kwargs: Any) -> None:
        begun.set()
        make(self, *args, **kwargs)

    monkeypatch.setattr(CheckFunctionManager, "__init__", making)
    return begun


def compiled(case: Case, **options: object) -> Any:
    return case.compile({"lowering": "inductor", **options}, dynamic=True)


def inputs() -> dict[str, torch.Tensor]:
    return FAMILIES["llama"].inputs(len(NAMES), 4)


def test_guards_are_made_meanwhile(
    shallow: Case, libraries: Libraries, guards: threading.Event
) -> None:
    came: list[bool] = []
    libraries.before = lambda: came.append(guards.is_set())
    check_mixed(compiled(shallow), shallow, NAMES, inputs())
    assert came
    assert all(came)


def test_of_the_base_too(shallow: Case, libraries: Libraries, guards: threading.Event) -> None:
    came: list[bool] = []
    libraries.before = lambda: came.append(guards.is_set())
    names, asked = [None] * len(NAMES), inputs()
    got = compiled(shallow)(**asked, adapter_names=names)["logits"]
    want = shallow.expected(names, asked)
    assert error(valid(asked, got), valid(asked, want)) <= TOLERANCE
    assert came
    assert all(came)


def test_a_graph_is_told_when_its_kernels_are_there(
    shallow: Case, libraries: Libraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    cm, loaded = compiled(shallow), []
    monkeypatch.setattr(cm._session.backend, "recorded", lambda: loaded.append(libraries.loaded))
    cm(**inputs(), adapter_names=NAMES)
    assert loaded == [libraries.loaded] != [0]
    (record,) = cm._session.backend.records
    assert [span.name for span in record.spans].count("inductor") == 1 + libraries.loaded


@pytest.mark.usefixtures("libraries")
def test_two_threads_that_call_first(shallow: Case) -> None:
    cm = compiled(shallow)
    served: list[int] = []

    def serve() -> None:
        check_mixed(cm, shallow, NAMES, inputs())
        served.append(1)

    for thread in [in_thread(serve) for _ in range(2)]:
        thread.join()
    assert len(served) == 2


@pytest.mark.parametrize("saved", [True, False])
def test_a_compiler_that_fails_is_named_and_nothing_is_kept(
    shallow: Case, libraries: Libraries, tmp_path: Path, saved: bool
) -> None:
    def fail() -> None:
        raise CppCompileError(["g++"], "no space left on device")

    folder = tmp_path / "graphs"
    cm = compiled(shallow, **({"cache": str(folder)} if saved else {}))
    libraries.before = fail
    for _ in range(2):
        with pytest.raises(LoweringError, match="the lowering 'inductor' failed on a graph") as got:
            cm(**inputs(), adapter_names=NAMES)
        assert "no space left on device" in str(got.value)
        assert not cm._session.backend.records
        assert not cm._session.backend.instances._compiled
    assert not [file for file in folder.rglob("*") if file.is_file()]
    libraries.before = lambda: None
    CppPythonBindingsCodeCache.cache_clear()  # it keeps compilers that have failed
    check_mixed(cm, shallow, NAMES, inputs())
    assert len(cm._session.backend.records) == 1
    assert bool(cm._session.backend.instances._compiled) != saved
    assert any(file.is_file() for file in folder.rglob("*")) == saved


def in_thread(function: Callable[..., object], *arguments: object) -> threading.Thread:
    """A thread that runs it, by the settings of Inductor that hold here."""
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(function, *arguments))
    thread.start()
    return thread


def future() -> LambdaFuture:
    return LambdaFuture(lambda: len)


@pytest.fixture
def workers() -> Iterator[None]:
    with torch._inductor.config.patch(compile_threads=2):
        yield


@pytest.mark.usefixtures("workers")
def test_only_the_conversion_waits_later() -> None:
    modules: list[dict[str, Any]] = [{"kernel": future()} for _ in range(3)]
    own, other, outside = modules

    @kernels_awaited
    def convert() -> None:
        with kernels_left("inductor", []):
            AsyncCompile().wait(own)
            thread = in_thread(AsyncCompile().wait, other)
            thread.join()
        AsyncCompile().wait(outside)
        assert own["kernel"] is not len
        assert other["kernel"] is outside["kernel"] is len

    convert()
    assert own["kernel"] is len


@pytest.mark.usefixtures("workers")
def test_without_a_conversion_all_is_as_ever() -> None:
    module: dict[str, Any] = {"kernel": future()}
    with kernels_left("inductor", []):
        AsyncCompile().wait(module)
    assert module["kernel"] is len


@pytest.mark.usefixtures("workers")
def test_a_kernel_that_is_called_earlier_waits_itself() -> None:
    module: dict[str, Any] = {"kernel": future()}

    @kernels_awaited
    def convert() -> int:
        with kernels_left("inductor", []):
            AsyncCompile().wait(module)
            return module["kernel"]("abc")

    assert convert() == 3
    assert module["kernel"] is len
