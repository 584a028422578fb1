"""Processes beside the serving one, each forked from it at a call to compile that call's graph.

    the serving process ─ fork ─▶ it waits for its turn, and until the serving one rests
                               ─▶ it works ─▶ it writes one text, and ends

The model, its adapters and the arguments are shared until one of the two writes into them. The
process writes to no stream, socket or pipe of the serving one, and ends when that one does. The
first answers have all cores: it works when the serving process rests, or `PATIENCE` seconds after
the fork.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import logging
import mmap
import os
import signal
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch

#: Seconds between two looks at the serving process, and that a process may take to end.
_LOOK, _LAST_SECONDS = 0.5, 2.0
#: Seconds without any work after which a process gives up: a lock that another thread of the
#: serving process held at the fork is never free.
_STANDSTILL = 300.0
_LONGEST_TEXT = 4000
#: A serving process rests if it uses less of a core than this share between two looks; seconds
#: between these, and after the fork for which it need not rest.
_RESTS, _LOOK_AT_REST, PATIENCE = 0.1, 0.2, 10.0
#: What a process hears that works: to take what calls leave of the cores, or a small share of one.
_BEHIND, _BESIDE = b"!", b"+"
_NICE = 10


def can_fork() -> bool:
    """Whether a process can go on after a fork without calling exec: not with Apple's libraries."""
    return sys.platform == "linux"


class Process:
    """A process that does `work` when its turn comes, and reports the text that this returns, or
    that of the error that it raises. It does `orphaned` if the serving process ends before it. It
    is made undisturbed by signals (lorafx.interrupts), so that the one who makes it has noted it.

    Raises:
        OSError: there is no memory for it, or no file descriptor.
    """

    def __init__(
        self, work: Callable[[], str], orphaned: Callable[[], object] = lambda: None
    ) -> None:
        self._work, self._orphaned = work, orphaned
        #: What the process reported, or how it ended without; None until it has ended.
        self.outcome: str | None = None
        self.has_turn = self.reported = False
        #: One byte that both processes share: whether the process works.
        self._works = mmap.mmap(-1, 1)
        self._fork()
        del self._work, self._orphaned

    def _fork(self) -> None:
        ends = list[int]()
        try:
            ends += os.pipe()
            ends += os.pipe()
            (wait, self._go, self._told, tell), parent = ends, os.getpid()
            os.set_blocking(self._told, False)  # another thread's child may hold the other end
            with warnings.catch_warnings():  # about other threads: see _STANDSTILL
                warnings.simplefilter("ignore", DeprecationWarning)
                self.pid = os.fork()
        except OSError:
            for end in ends:
                os.close(end)
            raise
        if not self.pid:
            _serve_turn(self._work, self._orphaned, parent, wait, tell, self._works)
        os.close(wait)
        os.close(tell)
        with contextlib.suppress(OSError):  # it has done so itself
            os.setpgid(self.pid, self.pid)

    @property
    def works(self) -> bool:
        """Whether the process has begun to work."""
        return bool(self._works[0])

    def start(self, *, behind: bool = True) -> None:
        """Give the process its turn, `behind` the calls: with what they leave of the cores."""
        self.has_turn = True
        with contextlib.suppress(OSError):  # it has ended
            os.write(self._go, _BEHIND if behind else _BESIDE)

    def poll(self) -> str | None:
        """What the process reported, if it has ended."""
        if self.outcome is None:
            self._reap(os.WNOHANG)
        return self.outcome

    def end(self) -> None:
        """End the process and the compilers that it runs, if it has not ended."""
        for number in (signal.SIGTERM, signal.SIGKILL):  # compilers remove what they have begun
            if self.poll() is not None:
                return
            with contextlib.suppress(OSError):
                os.killpg(self.pid, number)
            last = time.monotonic() + _LAST_SECONDS
            while self.poll() is None and time.monotonic() < last:
                time.sleep(0.002)

    def forget(self) -> None:
        """Leave the process to the one that forked it: this is another child of that one."""
        if self.outcome is None:
            self.outcome = "the process beside belongs to another process"
            self._close()

    def _reap(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self.pid, options)
        except ChildProcessError:  # somebody else has waited for it
            pid, status = self.pid, 0
        if not pid:
            return
        text = ""
        with contextlib.suppress(BlockingIOError):
            text = os.read(self._told, _LONGEST_TEXT).decode(errors="replace")
        self.reported = bool(text)
        if text:
            self.outcome = text.partition(":")[2]
        elif os.WIFSIGNALED(status):
            self.outcome = f"the process beside was ended by signal {os.WTERMSIG(status)}"
        else:
            self.outcome = "the process beside ended without a word"
        self._close()

    def _close(self) -> None:
        os.close(self._go)
        os.close(self._told)


def _serve_turn(
    work: Callable[[], str],
    orphaned: Callable[[], object],
    parent: int,
    go: int,
    told: int,
    works: mmap.mmap,
) -> NoReturn:
    """The life of the forked process."""
    last = time.monotonic() + PATIENCE
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        _leave_alone({go, told})
        gc.freeze()  # a collection would write into all objects, and so copy their memory
        context = contextvars.copy_context()
        modes = _modes()
        turn = threading.Event()

        def run() -> None:
            if said := os.read(go, 1):
                _wait_for_rest(parent, last)
                if said == _BEHIND:
                    _go_behind()
                turn.set()
                works[0] = 1
                with modes[0], modes[1]:
                    os.write(told, f"told:{_outcome(context, work)}".encode()[:_LONGEST_TEXT])

        # In a thread of its own, OpenMP makes new threads; those of the serving process that the
        # forking thread would wait for do not exist here.
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        _watch(thread, turn, parent, orphaned)
    finally:
        os._exit(0)


def _go_behind() -> None:
    """Let this thread, and what it starts, take only what all others leave of the cores.

    Eager calls run one operator after another, each in threads that wait for the last of them.
    Beside a process that is only nice, such a thread waits for a time slice, once an operator.
    """
    with contextlib.suppress(OSError):  # where that is not allowed
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _wait_for_rest(parent: int, last: float) -> None:
    """Return when the serving process rests, or at the time `last`."""
    used = float("-inf")
    while time.monotonic() < last:
        before, used = used, _seconds_used(parent)
        if used - before < _RESTS * _LOOK_AT_REST:
            return
        time.sleep(_LOOK_AT_REST)


def _seconds_of_all(process: int) -> float:
    """The CPU time of a process and of those below it, such as compilers, while they run."""
    below: list[str] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{task}/children") as file:
                below += file.read().split()
    return _seconds_used(process) + sum(_seconds_of_all(int(child)) for child in below)


def _seconds_used(process: int) -> float:
    """The CPU time of a process, by proc(5), or none if it has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{process}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _outcome(context: contextvars.Context, work: Callable[[], str]) -> str:
    try:
        return context.run(work)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def _modes() -> tuple[contextlib.AbstractContextManager[object], ...]:
    """The modes of torch in this thread, for another one."""
    return (
        torch.inference_mode(torch.is_inference_mode_enabled()),
        torch.autocast(
            "cpu",
            dtype=torch.get_autocast_dtype("cpu"),
            enabled=torch.is_autocast_enabled("cpu"),
            cache_enabled=torch.is_autocast_cache_enabled(),
        ),
    )


def _leave_alone(own: set[int]) -> None:
    """Cut this process off from streams, sockets, pipes, signals and the log of the serving one."""
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for handled in signal.valid_signals():
        if callable(signal.getsignal(handled)):
            signal.signal(handled, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            number = int(name)
            mode = os.fstat(number).st_mode
            # Numbers stay in use, since objects here may close them.
            if number < 3 or (number not in own and (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode))):
                os.dup2(nothing, number, inheritable=number < 3)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.nice(_NICE)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # where memory runs out, this process goes first


def _watch(
    thread: threading.Thread, turn: threading.Event, parent: int, orphaned: Callable[[], object]
) -> None:
    """Return when the thread has ended, or stands still. End this process with its serving one."""
    seconds, since = 0.0, time.monotonic()
    while thread.is_alive() and time.monotonic() < since + _STANDSTILL:
        thread.join(_LOOK)
        if os.getppid() != parent:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.killpg(0, signal.SIGTERM)  # compilers
            orphaned()
            return
        now = _seconds_of_all(os.getpid())
        if abs(now - seconds) > 0.1 or not turn.is_set():
            seconds, since = now, time.monotonic()
