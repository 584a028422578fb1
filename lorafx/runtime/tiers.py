"""Tiers: calls for which no graph is ready are answered eagerly, while graphs are compiled beside.

    a call → a graph serves it       → it runs
           → none does               → the model runs eagerly, at once; when this kind of call has
                                       come twice, a process beside (lorafx.runtime.beside) compiles
                                       its graph, and saves it for this process to load
           → it cannot run eagerly   → its graph is compiled here, and the call waits for it

Calls are of one *kind* if their arguments differ in values and sizes only, as far as Dynamo takes
these for symbols. One process compiles at a time, for the kind with the most calls; those of other
kinds wait for their turn. This process never traces a call that is answered eagerly.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from lorafx.capture.compiler_failures import NoGraph, Unprepared, chain
from lorafx.capture.saved_graphs.folder import folder_of
from lorafx.config import Options, dump_folder
from lorafx.eager.following import NeedsGraph
from lorafx.eager.tier import EagerTier
from lorafx.errors import ConfigError, LorafxWarning, VerifyError, numbered
from lorafx.interrupts import undisturbed
from lorafx.placements import divides_experts
from lorafx.program.argument_roles import PRIMARY, tensor_leaves
from lorafx.progress import LongWork
from lorafx.runtime.beside import Process, can_fork
from lorafx.runtime.collection import collection_paused
from lorafx.torch_internals.versions import saves_graphs

if TYPE_CHECKING:
    from lorafx.program.program import Program
    from lorafx.runtime.entry import Entry
    from lorafx.runtime.session import Session

T = TypeVar("T")
TierName = Literal["eager", "compiling", "ready", "kept eager", "refused"]

#: Precede the path of a saved graph, and why calls are refused, in what a process reports.
_SAVED, _REFUSED = "saved as ", "refused, since "
#: How the names of private folders begin, and the age in seconds from which one may be left over.
_PREFIX, _NEW = "lorafx-graphs-", 60.0
#: The calls of a kind before a process is forked for it, and the most such processes of a kind.
CALLS, _MOST_PROCESSES = 2, 3
#: The most kinds of calls that are told apart, and the deepest level of containers that is.
_MOST_KINDS, _DEPTH = 256, 3


@dataclass(frozen=True)
class KindStatus:
    """A kind of calls: how many there were, how the next is answered, and why it stays eager."""

    kind: str
    calls: int
    tier: TierName
    reason: str = ""

    def __str__(self) -> str:
        why = self.reason
        if self.tier == "eager" and self.calls < CALLS:
            why = "its graph is compiled from its second call on"
        return f"{self.kind}, {numbered(self.calls, 'call')}: {self.tier}{why and f': {why}'}"


@dataclass(frozen=True)
class Status:
    """How the kinds of calls so far are answered, and the number of graphs in this process or ready
    to be loaded."""

    kinds: tuple[KindStatus, ...]
    graphs: int

    @property
    def compiling(self) -> int:
        """The number of kinds whose graph is being compiled."""
        return self.count("compiling")

    @property
    def progress(self) -> str:
        """Such as "compiling: 3 of 5 graphs"; empty if none is being compiled."""
        if not self.compiling:
            return ""
        kinds = len(self.kinds) - self.count("kept eager")
        return f"compiling: {self.count('ready')} of {kinds} graphs"

    def count(self, tier: TierName) -> int:
        return sum(kind.tier == tier for kind in self.kinds)

    def __str__(self) -> str:
        return "\n".join([numbered(self.graphs, "graph"), *map(str, self.kinds)])


@dataclass(eq=False)
class _Kind:
    """A kind of calls. `saved`: the next call may load a graph; `wrong`: how often the call that a
    process was forked for raised; `looked`: the numbers of saved graphs, and of those in this
    process, among which none served the last call."""

    name: str
    calls: int = 0
    process: Process | None = None
    processes: int = 0
    has_graph: bool = False
    here: bool = False
    saved: bool = False
    wrong: int = 0
    looked: tuple[int, int] = (0, 0)
    reason: str = ""
    refused: bool = False

    @property
    def tier(self) -> TierName:
        if self.refused:
            return "refused"
        if self.process is not None:
            return "compiling"
        if self.has_graph or self.here or self.saved:
            return "ready"
        return "kept eager" if self.reason else "eager"


def starts_eagerly(program: Program) -> bool:
    """Whether calls are answered eagerly until there are graphs, by `Options.start`."""
    options, device = program.options, program.runtime.device
    start = options.start
    if start == "auto":  # checked as the option is
        start = Options(start=cast(Any, os.environ.get("LORAFX_START", "auto"))).start
    if start == "auto":
        beside = device.type == "cpu" and can_fork() and saves_graphs() and not program.is_placed
        return beside and not _shows_graphs(options)
    # What can be followed depends on numbers, and the ranks' experts get other rows.
    return start == "eager" and not any(map(divides_experts, program.model.parameters()))


def _usable_folder(cache: str | bool | None) -> Path | None:
    """The folder of the value of `Options.cache`."""
    try:
        return folder_of(cache) if cache else None
    except ConfigError:
        return None


def _shows_graphs(options: Options) -> bool:
    """Whether options ask for what is seen only where graphs are compiled in this process."""
    changed = not all(isinstance(value, bool) for value in options.passes.values())
    return dump_folder(options) is not None or options.verify == "numeric" or changed


class PrivateFolder(os.PathLike[str]):
    """A folder of this process alone, made when it is needed and removed with this object; another
    one in a child process. A process that is killed removes none: the process beside does, or the
    next process that makes one."""

    def __init__(self) -> None:
        self._made: tuple[int, str] | None = None

    def __fspath__(self) -> str:
        if self._made is None or self._made[0] != os.getpid():
            _remove_left()
            self._made = os.getpid(), tempfile.mkdtemp(prefix=_PREFIX)
            weakref.finalize(self, _remove, *self._made, _locked(self._made[1]))
        return self._made[1]

    def keep(self, folder: str) -> None:
        """Use the folder of the parent, which removes it."""
        self._made = os.getpid(), folder


def _remove(owner: int, folder: str, lock: int | None) -> None:
    if owner == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _locked(folder: str | Path) -> int | None:
    """A descriptor that locks a folder until it is closed, as it is when its process and those
    beside it have ended; None if another process has the lock, or there are none."""
    with suppress(ImportError, OSError):
        import fcntl

        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number
        except OSError:
            os.close(number)
    return None


def _remove_left() -> None:
    """Remove the folders of this user's processes that have ended without doing so."""
    with suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            status = folder.lstat()
            new = time.time() < status.st_mtime + _NEW  # it may not be locked yet
            if status.st_uid == os.getuid() and not new and (lock := _locked(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


class Tiers:
    """Answers the calls of a session, whose lock is held."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._eager = EagerTier(session.program, session.replacements.replacing)
        #: Through it processes beside hand graphs over where `Options.cache` has no folder.
        self.folder = PrivateFolder()
        self._kinds: dict[object, _Kind] = {}
        #: Grows with each graph that may have come into the folder.
        self._saved = int(bool(session.program.options.cache))
        self._shown: LongWork | None = None
        self._said: set[str] = set()
        self._processes: list[Process] = []
        #: Calls that were answered eagerly.
        self.eager_calls = 0
        weakref.finalize(self, _end, self._processes)

    def run(
        self, entry: Entry, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, base: bool
    ) -> Any:
        """The result of a call of the entry."""
        kind = self._kind(entry, args, kwargs, base)
        kind.calls += 1
        if entry.session.program.is_placed and kind.calls > 1:
            kind.here = True  # on all ranks at the same call, or they would wait for one another
        self._look()
        if kind.refused:
            raise VerifyError(f"{kind.name}: {kind.reason}")
        if kind.here:
            return entry.run_graph(args, kwargs, base=base)
        saved, _ = kind.looked
        graphs = self._saved, len(entry.session.records)
        if (kind.has_graph or graphs != kind.looked) and _is_prepared():
            loads = self._saved != saved
            try:
                with collection_paused() if loads else nullcontext():
                    find = attrgetter("load" if loads else "find")
                    result = entry.run_graph(args, kwargs, base=base, conversion=find)
            except Unprepared as found:
                _prepare_files(entry.session.program, found.paths)
            except NoGraph:
                kind.looked, kind.saved = graphs, False
                if kind.processes >= _MOST_PROCESSES and not kind.has_graph and not kind.reason:
                    self._keep_eager(kind, "the graphs that were compiled serve none of them")
            else:
                kind.has_graph, kind.saved, kind.reason = True, False, ""
                return result
        forked = kind.processes
        if self._is_due(kind) and not entry.session.program.is_placed:
            save = attrgetter("save")
            call = partial(entry.run_graph, args, kwargs, base=base, conversion=save)
            compare = partial(self._verdict, entry, args, kwargs, base)
            entry.session.program.pack_watch.pack()  # so that the process shares the packs
            self._fork(kind, partial(_compile, entry, call, compare))
        try:
            result = self._eagerly(entry, partial(self._eager.run, entry.in_python, args, kwargs))
            self.eager_calls += 1
            return result
        except NeedsGraph as refusal:
            kind.here, kind.reason = True, f"compiled in this process, since {refusal}"
            self._end_process(kind)
            return entry.run_graph(args, kwargs, base=base)
        except Exception:  # the call's own, which the process beside would report once more
            if kind.processes > forked:
                self._end_process(kind)
                kind.processes, kind.wrong = forked, kind.wrong + 1
            raise

    def _eagerly(self, entry: Entry, run: Callable[[], T]) -> T:
        """Return the result of `run`, a forward in eager mode."""
        session, runtime = entry.session, entry.session.program.runtime
        if session.requests.tokens is not None and not session.requests.packed:
            raise NeedsGraph("tokens of one request have slots of their own")
        no_grad = torch.no_grad() if torch.is_grad_enabled() else nullcontext()
        active, threads = runtime.active, torch.get_num_threads()
        try:
            if all(row < 0 for row in runtime.rows):
                runtime.active = False
            if self._processes and threads > 1:  # OpenMP's wait for the one that shares its core
                _use_threads(threads - 1, of_new=threads)
            with no_grad, session.without_mha_fast_path():
                return run()
        finally:
            runtime.active = active
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            session.program.hook_watch.accept_new()

    def _verdict(
        self,
        entry: Entry,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        base: bool,
    ) -> tuple[str, str]:
        """`ComparedCall.verdict` of a call, in the process beside."""
        from lorafx.runtime.comparison import ComparedCall

        def eagerly(read: Callable[[Any], Any], sites: list[tuple[str, Tensor]]) -> Any:
            look = partial(self._eager.look, entry.in_python, args, kwargs, read, sites)
            return self._eagerly(entry, look)

        self._processes.clear()  # they are the serving process's
        return ComparedCall(entry, args, kwargs, base, eagerly).verdict()

    # --- processes ---

    def _is_due(self, kind: _Kind) -> bool:
        return (
            kind.calls >= CALLS << kind.wrong
            and kind.process is None
            and not kind.reason
            and kind.processes < _MOST_PROCESSES
            and can_fork()
            and not _preparing()
        )

    def _fork(self, kind: _Kind, work: Callable[[], str]) -> None:
        """Fork a process for the running call."""
        session = self._session()
        assert session is not None

        def compile() -> str:
            if private is not None:
                self.folder.keep(private)
            return work()

        def begin() -> None:
            kind.process = Process(compile, orphaned)
            self._processes.append(kind.process)

        def orphaned() -> None:
            if private is not None:
                shutil.rmtree(private, ignore_errors=True)

        kind.processes += 1
        try:
            folder = _usable_folder(session.program.options.cache)
            private = os.fspath(self.folder) if folder is None else None
            undisturbed(begin)
        except OSError as error:  # no memory, file descriptors, or place for files
            self._keep_eager(kind, f"no process that compiles could be started: {error}")
            return
        if folder is not None and not _is_prepared() and any(folder.glob("*/*.graph")):
            _prepare(_import)  # there may be a graph of an earlier process
        self._look()

    def _look(self) -> None:
        """Note the processes that have ended, and let the next one work."""
        working = None
        for kind in self._waiting():
            process = kind.process
            assert process is not None
            if process.works and (outcome := process.poll()) is not None:
                self._note(kind, outcome)
            elif process.works:
                working = kind
        if working is None:
            following = max(self._waiting(), key=lambda kind: kind.calls, default=None)
            if following is not None and following.process is not None:
                following.process.start()
                self._shown = LongWork(f"compiling {following.name}, beside the calls")
                self._shown.show()

    def _waiting(self) -> list[_Kind]:
        return [kind for kind in self._kinds.values() if kind.process is not None]

    def _note(self, kind: _Kind, outcome: str) -> None:
        process, session = self._end_process(kind), self._session()
        assert process is not None
        assert session is not None
        if self._shown is not None:
            self._shown.end()
        if outcome.startswith(_SAVED):
            _prepare_files(session.program, [Path(outcome.removeprefix(_SAVED))])
            self._saved += 1
            kind.saved = True
        elif outcome.startswith(_REFUSED):
            kind.refused, kind.reason = True, outcome.removeprefix(_REFUSED)
        elif session.program.options.fallback == "refuse" and process.reported:
            kind.here = True
        elif process.reported or kind.processes >= _MOST_PROCESSES:  # others may have ended it
            self._keep_eager(kind, outcome)

    def _end_process(self, kind: _Kind) -> Process | None:
        """End the process of a kind, and return it."""
        process, kind.process = kind.process, None
        if process is not None:
            process.end()
            self._processes.remove(process)
        return process

    def _keep_eager(self, kind: _Kind, reason: str) -> None:
        kind.reason = reason
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"calls stay eager ({kind.name}): {reason}", LorafxWarning, stacklevel=2)

    def end(self) -> None:
        """End all processes; their kinds may be tried again."""
        for kind in self._waiting():
            kind.process = None
        _end(self._processes)

    def forget(self) -> None:
        """Leave the processes to the parent of this one."""
        for process in self._processes:
            process.forget()
        self._processes.clear()
        for kind in self._waiting():
            kind.process = None

    # --- what is seen of it ---

    def status(self, session: Session) -> Status:
        """The present state. No lock is waited for: a running call looks at processes itself."""
        if session.lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                session.lock.release()
        kinds = (
            KindStatus(kind.name, kind.calls, kind.tier, kind.reason)
            for kind in list(self._kinds.values())
        )
        saved = sum(kind.saved for kind in list(self._kinds.values()))
        return Status(tuple(kinds), len(session.records) + saved)

    def busy(self, session: Session) -> bool:
        """Whether a graph is being compiled beside, or what the next call loads is prepared."""
        return bool(self.status(session).compiling) or _preparing()

    # --- kinds ---

    def _kind(
        self, entry: Entry, args: tuple[Any, ...], kwargs: Mapping[str, Any], base: bool
    ) -> _Kind:
        program = entry.session.program
        fixed = entry.session.dynamic is False
        form = (
            entry,
            (program.unguarded_state(), base, program.model.training),
            (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
            tuple(_form(item, fixed) for item in args),
            tuple((name, _form(item, fixed)) for name, item in kwargs.items()),
        )
        kind = self._kinds.get(form)
        if kind is None:
            while len(self._kinds) >= _MOST_KINDS:
                self._end_process(self._kinds.pop(next(iter(self._kinds))))
            kind = self._kinds[form] = _Kind(_name(entry, kwargs))
        return kind


def _end(processes: list[Process]) -> None:
    for process in processes:
        process.end()
    processes.clear()


def _use_threads(number: int, *, of_new: int) -> None:
    """Have this thread compute with so many threads of OpenMP, and threads that are born from now
    on with others: they take the number that was set last, on whichever thread."""
    torch.set_num_threads(number)
    setter = threading.Thread(target=torch.set_num_threads, args=(of_new,), daemon=True)
    setter.start()
    setter.join()


def _compile(entry: Entry, call: Callable[[], Any], compare: Callable[[], tuple[str, str]]) -> str:
    """Compile and save the graph of `call`, in a process for this alone, and `compare` its answer.
    Returns where it is, or why it is not to be taken."""
    session = entry.session
    session.locks.calls = threading.RLock()  # that of the serving process is another thread's
    session.running = session.running._replace(thread=threading.get_ident())
    try:
        call()
    except NoGraph as end:
        file, reason = end.args
        if file is None:
            return reason
        from lorafx.capture.saved_graphs.saved_graphs import prepare

        prepare(session.program, file)
        verdict, reason = compare()
        if not verdict:
            return f"{_SAVED}{file}"
        file.unlink(missing_ok=True)
        return f"{_REFUSED if verdict == 'refused' else ''}{reason}"
    except Exception as error:
        cause = chain(error)[-1]
        text = " ".join(str(cause).partition("\n\n")[0].split())  # traces of Dynamo follow
        return f"{type(cause).__name__}: {text}"
    return "a graph of the serving process serves it"


def _form(value: Any, fixed: bool, depth: int = _DEPTH) -> object:
    """What graphs depend on of an argument; `fixed`: on all of its sizes."""
    if isinstance(value, Tensor):
        constant = getattr(value, "_dynamo_static_indices", ())
        sizes = tuple(
            size if fixed or dim in constant else min(size, 2)
            for dim, size in enumerate(value.shape)
        )
        return value.dtype, sizes, value.requires_grad, type(value)
    if value is None or isinstance(value, (bool, float, str, bytes)):
        return type(value), value
    if isinstance(value, int):
        return int, value if fixed else min(max(value, -1), 2)
    if isinstance(value, (list, tuple)) and depth:
        return type(value), tuple(_form(item, fixed, depth - 1) for item in value)
    if isinstance(value, Mapping) and depth:
        items = tuple((str(key), _form(item, fixed, depth - 1)) for key, item in value.items())
        return type(value), items
    # Whether a cache is empty.
    return type(value), tuple(_form(item, fixed) for item in islice(tensor_leaves(value), 1))


def _name(entry: Entry, kwargs: Mapping[str, Any]) -> str:
    program = entry.session.program
    rows, names = len(program.runtime.rows), ["with adapters" if program.batch.touched else "base"]
    if entry.roles.packed:
        names = ["a step of continuous batching"]
    names.append("one request" if rows == 1 else "several requests")
    tokens = next((kwargs[name] for name in PRIMARY if isinstance(kwargs.get(name), Tensor)), None)
    if tokens is not None and tokens.dim() > 1:
        names.append("one token each" if tokens.shape[1] == 1 else "several tokens each")
    return f"{entry.name}, {', '.join(names)}"


# --- what loading a graph needs, which a thread prepares: no call waits for it ---

_MODULES = ("lorafx.capture.backend", "lorafx.capture.saved_graphs.saved_graphs")
_preparation: threading.Thread | None = None


def _preparing() -> bool:
    return _preparation is not None and _preparation.is_alive()


def _is_prepared() -> bool:
    return not _preparing() and all(name in sys.modules for name in _MODULES)


def _prepare(action: Callable[[], object]) -> None:
    """Have `action` run in a thread, after earlier ones."""
    global _preparation
    before = _preparation

    def run() -> None:
        if before is not None:
            before.join()
        with suppress(Exception):  # a call that needs it raises it again
            action()

    thread = threading.Thread(target=run, name="lorafx prepares", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the process has as many threads as it may
        run()
    else:
        _preparation = thread


def _import() -> None:
    for name in _MODULES:
        importlib.import_module(name)


def _prepare_files(program: Program, paths: Iterable[Path]) -> None:
    reference = weakref.ref(program)  # the thread keeps no model alive

    def action() -> None:
        _import()
        from lorafx.capture.saved_graphs.saved_graphs import prepare

        for path in paths:
            if (alive := reference()) is not None:
                prepare(alive, path)

    _prepare(action)


def _wait_for_preparation() -> None:
    """A lock that the thread holds at a fork would never be free in the child."""
    if _preparation is not None and _preparation is not threading.current_thread():
        _preparation.join()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_preparation)
