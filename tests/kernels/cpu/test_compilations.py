"""Each library is compiled once, whoever asks, and ends with the process that asked."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu import compilations
from lorafx.kernels.cpu.compilations import ahead, compiled
from lorafx.kernels.cpu.compiler import find_compiler, load_library

#: A compiler that notes each start, waits, and copies the source.
SLOW = """#!/bin/sh
echo $$ >> {log}
{work}
cp "$1" "$3"
"""


class Compiler:
    """A script that stands for a compiler, and what it has noted."""

    def __init__(self, folder: Path, work: str) -> None:
        self.log = folder / "log"
        self.path = folder / "compiler"
        self.path.write_text(SLOW.format(log=self.log, work=work))
        self.path.chmod(0o755)
        self.library = folder / "cache" / "a.so"
        self.library.parent.mkdir()

    def compile(self, *, wait: bool = True) -> None:
        compiled([str(self.path)], "text", self.library, wait=wait)

    @property
    def started(self) -> list[int]:
        """Numbers of the processes."""
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.library.parent.iterdir())


def until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def idle() -> bool:
    return not compilations._WORKERS


def test_threads_compile_once(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path, "sleep 0.2")
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(compiler.compile) for _ in range(8)]:
            done.result()
    assert len(compiler.started) == 1
    assert compiler.files == ["a.cpp", "a.so"]
    assert compiler.library.read_text() == "text"


@pytest.mark.parametrize("left", [0, 40, 5000])
def test_a_library_that_is_not_whole(tmp_path: Path, left: int) -> None:
    """It is named and compiled again, once; one that is whole stays."""
    source = 'extern "C" int answer() { return 42; }'
    library = tmp_path / "a.so"
    command = [find_compiler(), "-shared", "-fPIC"]
    compiled(command, source, library)
    os.truncate(library, left)
    with pytest.warns(LorafxWarning, match=r"a\.so is not whole"):
        compiled(command, source, library)
    assert load_library(library).answer() == 42
    before = library.stat().st_mtime_ns
    compiled(command, source, library)
    assert library.stat().st_mtime_ns == before


def test_processes_compile_once(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path, "sleep 0.3")
    child = os.fork()
    if not child:
        compiler.compile()
        os._exit(0)
    compiler.compile()
    assert os.waitpid(child, 0)[1] == 0
    assert len(compiler.started) == 1
    assert compiler.files == ["a.cpp", "a.so"]


def test_a_process_that_keeps_a_library_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilations, "PATIENCE", 0.1)
    compiler = Compiler(tmp_path, "")
    source = compiler.library.with_suffix(".cpp")
    with source.open("a+") as file:
        assert not compilations._lock(file)
        compiler.compile(wait=False)
        assert not compiler.started
        compiler.compile()
    assert len(compiler.started) == 1
    assert source.read_text() == "text"


def test_what_is_asked_for_while_it_is_compiled_ahead(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path, "sleep 0.3")
    ahead([lambda: compiler.compile(wait=False)] * 2)
    until(lambda: compiler.started)
    compiler.compile(wait=False)
    assert not compiler.library.exists()
    compiler.compile()
    assert compiler.library.exists()
    until(idle)
    assert len(compiler.started) == 1


def test_what_fails_in_the_background_is_told_where_it_is_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler = Compiler(tmp_path, "echo no such thing >&2; exit 1")
    ahead([lambda: compiler.compile(wait=False), lambda: compiler.compile(wait=False)])
    until(idle)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(LoweringError, match="refused a generated kernel:\nno such thing"):
        compiler.compile()
    assert compiler.files == []


def test_those_that_wait_are_told_too(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path, "sleep 0.2; exit 1")
    ahead([lambda: compiler.compile(wait=False)])
    until(lambda: compiler.started)
    with pytest.raises(LoweringError, match="refused a generated kernel"):
        compiler.compile()
    until(idle)
    assert len(compiler.started) == 1


def test_an_interrupt_stops_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(tmp_path, "sleep 60")

    def interrupted(process: subprocess.Popen[str]) -> None:
        until(lambda: compiler.started)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "communicate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiler.compile()
    assert _gone(compiler.started)
    assert compiler.files == []


def _gone(processes: list[int]) -> bool:
    """Whether nothing is left of these, and of what they have started."""
    groups = subprocess.run(
        ["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True
    )
    alive = {int(line.split()[0]) for line in groups.stdout.splitlines() if "Z" not in line}
    return bool(processes) and not alive & set(processes)


ENDS = """
import sys, time
from pathlib import Path
from lorafx.kernels.cpu.compilations import ahead, compiled
from lorafx.kernels.cpu.compiler import find_compiler, load_library
compiler, library, log = sys.argv[1:]
def task(number):
    compiled([compiler], "text", Path(library + str(number)), wait=False)
ahead([lambda number=number: task(number) for number in range(9)])
while not Path(log).exists():
    time.sleep(0.01)
"""


def test_a_process_that_ends_takes_its_compilers_along(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path, "sleep 60")
    command = [sys.executable, "-c", ENDS]
    command += map(str, (compiler.path, compiler.library, compiler.log))
    start = time.monotonic()
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - start < 45, "it waited for a compiler"
    assert (done.stdout, done.stderr) == ("", "")
    assert _gone(compiler.started)
    assert compiler.files == []


def test_a_forked_child_does_not_wait_for_its_parents_threads(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path, "sleep 0.5")
    ahead([lambda: compiler.compile(wait=False)])
    until(lambda: compiler.started)
    child = os.fork()
    if not child:
        forgotten = idle() and not compilations._UNDER_WAY and not compilations._RUNNING
        compiler.compile()
        ahead([lambda: (tmp_path / "alive").touch()])
        until(idle)
        os._exit(0 if forgotten and (tmp_path / "alive").exists() else 1)
    assert os.waitpid(child, 0)[1] == 0
    until(idle)
    assert len(compiler.started) == 1


def test_tasks_run_beside_the_thread_that_asks() -> None:
    threads: list[threading.Thread] = []
    ahead([lambda: threads.append(threading.current_thread())] * 3)
    until(lambda: len(threads) == 3 and idle())
    assert threading.current_thread() not in threads
    assert all(thread.daemon for thread in threads)


def test_a_process_that_has_no_more_threads() -> None:
    """What would be compiled ahead is compiled where it is asked for."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    stack = threading.stack_size(1 << 32)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        with pytest.raises(RuntimeError, match="thread"):
            threading.Thread(target=print).start()
        ahead([lambda: None])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        threading.stack_size(stack)
    assert idle()
    done = threading.Event()
    ahead([done.set])
    assert done.wait(30)
    until(idle)
