"""Each library is compiled once, whoever asks, and ends with the process that asked."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu.compiler import compiled, find_compiler, load_library

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

    def compile(self) -> None:
        compiled([str(self.path)], "text", self.library)

    def begin(self) -> threading.Thread:
        """A thread that compiles it, or fails to."""

        def attempt() -> None:
            with contextlib.suppress(LoweringError):
                self.compile()

        thread = threading.Thread(target=attempt)
        thread.start()
        until(lambda: self.started)
        return thread

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


def test_threads_compile_once(tmp_path: Path) -> None:
    compiler = Compiler(tmp_path, "sleep 0.2")
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(compiler.compile) for _ in range(8)]:
            done.result()
    assert len(compiler.started) == 1
    assert compiler.files == ["a.cpp", "a.so"]
    assert compiler.library.read_text() == "text"


def test_a_library_that_is_not_whole(tmp_path: Path) -> None:
    """It is named and compiled again, once; one that is whole stays."""
    source = 'extern "C" int answer() { return 42; }'
    library = tmp_path / "a.so"
    command = [find_compiler(), "-shared", "-fPIC"]
    compiled(command, source, library)
    os.truncate(library, 40)
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
import sys, threading, time
from pathlib import Path
from lorafx.kernels.cpu.compiler import compiled
compiler, library, log = sys.argv[1:]
def task(number):
    compiled([compiler], "text", Path(library + str(number)))
for number in range(3):
    threading.Thread(target=task, args=(number,), daemon=True).start()
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
