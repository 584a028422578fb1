"""The processes that compile graphs of kinds of calls: when one is forked, whose turn it is, and
what it reports. One works at a time, for the kind with the most calls; those of other kinds wait.
"""

from __future__ import annotations

import os
import shutil
import threading
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path

from lorafx.capture.compiler_failures import chain
from lorafx.capture.missed import Missed
from lorafx.capture.saved_graphs.folder import folder_of
from lorafx.errors import ConfigError, LorafxWarning
from lorafx.interrupts import undisturbed
from lorafx.program.program import Program
from lorafx.progress import LongWork
from lorafx.runtime.beside.preparation import (
    import_backend,
    is_prepared,
    prepare,
    prepare_files,
    preparing,
)
from lorafx.runtime.beside.private_folder import PrivateFolder
from lorafx.runtime.beside.process import Process, can_fork
from lorafx.runtime.call import ForwardCall
from lorafx.runtime.kinds import CALLS, Kind, Kinds

#: Compares a call's answers by eager mode and by its saved graph: `ComparedCall.verdict`.
Verdict = Callable[[ForwardCall], tuple[str, str]]

#: Precede the path of a saved graph, and why calls are refused, in what a process reports.
_SAVED, _REFUSED = "saved as ", "refused, since "
#: The most processes that are forked for one kind.
MOST_PROCESSES = 3
#: Bytes of packs that a process makes for itself. More are made before the fork, and shared.
_COPIED = 1 << 28


class Compilers:
    """The processes beside a program's calls, for these kinds of them. The lock of calls is held
    where one of its methods is called."""

    def __init__(self, program: Program, kinds: Kinds) -> None:
        self._program, self._kinds = program, kinds
        #: Through it graphs are handed over where `Options.cache` has no folder.
        self.folder = PrivateFolder()
        #: Grows with each graph that may have come into the folder; 0: there was none before. To
        #: look for one takes as long as an eager step of a small model.
        self.saved = int(_usable_folder(program.options.cache) is not None)
        self.processes: list[Process] = []
        self._shown: LongWork | None = None
        self._said: set[str] = set()
        weakref.finalize(self, _end, self.processes)

    @property
    def working(self) -> bool:
        """Whether one of them works now."""
        return any(process.works for process in self.processes)

    def consider(self, call: ForwardCall, kind: Kind, verdict: Verdict) -> bool:
        """Fork a process for this call if its kind is due. Returns whether that was done."""
        due = kind.calls >= CALLS << kind.wrong and kind.process is None and not kind.reason
        if not due or kind.processes >= MOST_PROCESSES or not can_fork() or preparing():
            return False
        if self._program.is_placed:
            return False
        if self._program.pack_watch.nbytes > _COPIED:
            self._program.pack_watch.pack()
        self._fork(kind, partial(_compile, call, verdict))
        return True

    def _fork(self, kind: Kind, work: Callable[[], str]) -> None:
        def compile() -> str:
            if private is not None:
                self.folder.keep(private)
            return work()

        def begin() -> None:
            kind.process = Process(compile, orphaned)
            self.processes.append(kind.process)

        def orphaned() -> None:
            if private is not None:
                shutil.rmtree(private, ignore_errors=True)

        kind.processes += 1
        try:
            folder = _usable_folder(self._program.options.cache)
            private = os.fspath(self.folder) if folder is None else None
            undisturbed(begin)
        except OSError as error:  # no memory, file descriptors, or place for files
            self.keep_eager(kind, f"no process that compiles could be started: {error}")
            return
        if folder is not None and not is_prepared() and any(folder.glob("*/*.graph")):
            prepare(import_backend)  # there may be a graph of an earlier process
        self.look()

    def look(self) -> None:
        """Note the processes that have ended, and give the next one its turn."""
        works = False
        for kind in self._kinds:
            if kind.process is not None and kind.process.has_turn:
                outcome = kind.process.poll()
                works |= outcome is None
                if outcome is not None:
                    self._note(kind, outcome)
        if works:
            return
        waiting = [kind for kind in self._kinds if kind.process is not None]
        following = max(waiting, key=lambda kind: kind.calls, default=None)
        if following is not None and following.process is not None:
            # Threads of graphs wait in loops, which leave a process behind them next to nothing.
            graphs_serve = any(kind.tier == "ready" for kind in self._kinds)
            following.process.start(behind=not graphs_serve)
            self._shown = LongWork(f"compiling {following.name}, beside the calls")
            self._shown.show()

    def _note(self, kind: Kind, outcome: str) -> None:
        process = self.end_of(kind)
        assert process is not None
        if self._shown is not None:
            self._shown.end()
        if outcome.startswith(_SAVED):
            prepare_files(self._program, [Path(outcome.removeprefix(_SAVED))])
            self.saved += 1
            kind.saved = True
        elif outcome.startswith(_REFUSED):
            kind.refused, kind.reason = True, outcome.removeprefix(_REFUSED)
        elif self._program.options.fallback == "refuse" and process.reported:
            kind.here = True
        elif process.reported or kind.processes >= MOST_PROCESSES:  # others may have ended it
            self.keep_eager(kind, outcome)

    def keep_eager(self, kind: Kind, reason: str) -> None:
        """No graph of this kind is tried any more."""
        kind.reason = reason
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"calls stay eager ({kind.name}): {reason}", LorafxWarning, stacklevel=2)

    def end_of(self, kind: Kind) -> Process | None:
        """End the process of a kind, and return it."""
        process, kind.process = kind.process, None
        if process is not None:
            process.end()
            self.processes.remove(process)
        return process

    def end(self) -> None:
        """End all processes; their kinds may be tried again."""
        for kind in self._kinds:
            kind.process = None
        _end(self.processes)

    def forget(self) -> None:
        """Leave the processes to the parent of this one."""
        for process in self.processes:
            process.forget()
        self.processes.clear()
        for kind in self._kinds:
            kind.process = None


def _end(processes: list[Process]) -> None:
    for process in processes:
        process.end()
    processes.clear()


def _usable_folder(cache: str | bool | None) -> Path | None:
    """The folder of the value of `Options.cache`."""
    try:
        return folder_of(cache) if cache else None
    except ConfigError:
        return None


def _compile(call: ForwardCall, verdict: Verdict) -> str:
    """Compile and save the graph of a call, in a process for this alone, and compare its answer.
    Returns where it is, or why it is not to be taken."""
    session = call.session
    session.locks.calls = threading.RLock()  # that of the serving process is another thread's
    session.running = session.running._replace(thread=threading.get_ident())
    try:
        end = call.forward.run_graph(call, attrgetter("save"))
    except Exception as error:
        cause = chain(error)[-1]
        text = " ".join(str(cause).partition("\n\n")[0].split())  # traces of Dynamo follow
        return f"{type(cause).__name__}: {text}"
    if not isinstance(end, Missed):
        return "a graph of the serving process serves it"
    if end.file is None:
        return end.reason
    from lorafx.capture.saved_graphs.saved_graphs import prepare

    prepare(session.program, end.file)
    kept, reason = verdict(call)
    if not kept:
        return f"{_SAVED}{end.file}"
    end.file.unlink(missing_ok=True)
    return f"{_REFUSED if kept == 'refused' else ''}{reason}"
