"""Tiers: calls for which no graph is ready are answered eagerly, while graphs are compiled beside.

    a call → a graph of this process → it runs
           → a saved graph           → it is loaded, and runs
           → eager mode              → the model runs, at once; when this kind of call has come
                                       twice, a process beside (lorafx.runtime.beside) compiles its
                                       graph, and saves it for this process to load
           → where that is no answer → its graph is compiled here, and the call waits for it

This process never traces a call that is answered eagerly.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from lorafx.capture.missed import Missed
from lorafx.config import Options, dump_folder
from lorafx.eager.following import NeedsGraph
from lorafx.eager.tier import EagerTier
from lorafx.errors import VerifyError
from lorafx.model.experts import SWITCH
from lorafx.placements import divides_experts
from lorafx.program.refusals import LastingRefusal
from lorafx.runtime.beside.compilers import MOST_PROCESSES, Compilers
from lorafx.runtime.beside.preparation import is_prepared, prepare_files, preparing
from lorafx.runtime.beside.process import can_fork
from lorafx.runtime.call import ForwardCall, Tier
from lorafx.runtime.collection import collection_paused
from lorafx.runtime.kinds import Kind, Kinds, KindStatus, Status
from lorafx.torch_internals.versions import saves_graphs

if TYPE_CHECKING:
    from lorafx.program.program import Program
    from lorafx.runtime.session import Session

T = TypeVar("T")


def starts_eagerly(program: Program) -> bool:
    """Whether calls are answered eagerly until there are graphs, by `Options.start`."""
    options, device = program.options, program.runtime.device
    start = "compiled" if options.batch_invariant else options.start
    if start == "auto":  # checked as the option is
        start = Options(start=cast(Any, os.environ.get("LORAFX_START", "auto"))).start
    if start == "auto":
        beside = device.type == "cpu" and can_fork() and saves_graphs() and not program.is_placed
        return beside and not _shows_graphs(options)
    # What can be followed depends on numbers, and the ranks' experts get other rows.
    return start == "eager" and not any(map(divides_experts, program.model.parameters()))


def _shows_graphs(options: Options) -> bool:
    """Whether options ask for what is seen only where graphs are compiled in this process."""
    changed = not all(isinstance(value, bool) for value in options.passes.values())
    return dump_folder(options) is not None or options.verify == "numeric" or changed


class Tiers:
    """Answers the calls of a session, whose lock is held."""

    def __init__(self, session: Session) -> None:
        program = session.program
        self._program = program
        self._eager = EagerTier(program, session.replacements.replacing)
        self._kinds = Kinds()
        self.compilers = Compilers(program, self._kinds)
        #: Calls that were answered eagerly.
        self.eager_calls = 0
        _ALIVE.add(self)

    def of(self, call: ForwardCall) -> tuple[Tier, ...]:
        """The tiers of a call, in the order in which they are asked. The last one answers."""
        kind = self.kind_of(call)
        kind.calls += 1
        if self._program.is_placed and kind.calls > 1:
            kind.here = True  # on all ranks at the same call, or they would wait for one another
        self.compilers.look()
        if kind.refused:
            raise VerifyError(f"{kind.name}: {kind.reason}")
        if call.forward.looping:  # Dynamo would break it into pieces, where no row is known
            return (self._in_a_loop,)
        if kind.here:
            return (call.forward.run_graph,)
        return (
            partial(self._by_ready_graph, kind),
            partial(self._by_saved_graph, kind),
            partial(self._eagerly, kind),
            call.forward.run_graph,  # compiled here
        )

    def kind_of(self, call: ForwardCall) -> Kind:
        kind = self._kinds.of(call)
        if (oldest := self._kinds.drop_oldest()) is not None:
            self.compilers.end_of(oldest)
        return kind

    # --- the tiers ---

    def _by_ready_graph(self, kind: Kind, call: ForwardCall) -> Any:
        """The answer of a graph that this process has."""
        graphs = len(call.session.records)
        if not (kind.has_graph or graphs != kind.graphs_seen) or not is_prepared():
            return Missed("no graph of this process was made for such a call")
        result = call.forward.run_graph(call, attrgetter("find"))
        if isinstance(result, Missed):
            kind.graphs_seen = graphs
        else:
            kind.note_served()
        return result

    def _by_saved_graph(self, kind: Kind, call: ForwardCall) -> Any:
        """The answer of a graph that another process has saved, which is loaded here."""
        saved = self.compilers.saved
        if saved == kind.saved_seen or not is_prepared():
            return Missed("no graph was saved since such a call looked for one")
        with collection_paused():
            result = call.forward.run_graph(call, attrgetter("load"))
        if not isinstance(result, Missed):
            kind.note_served()
        elif result.unprepared:
            prepare_files(self._program, result.unprepared)
        else:
            kind.saved_seen, kind.saved = saved, False
            if kind.processes >= MOST_PROCESSES and not kind.has_graph and not kind.reason:
                self.compilers.keep_eager(kind, "the graphs that were compiled serve none of them")
        return result

    def _eagerly(self, kind: Kind, call: ForwardCall) -> Any:
        """The answer of eager mode, while a process beside compiles the graph of this kind."""
        forked = self.compilers.consider(call, kind, self._verdict)
        try:
            return self._run_eagerly(call)
        except NeedsGraph as refusal:
            kind.here, kind.reason = True, f"compiled in this process, since {refusal}"
            self.compilers.end_of(kind)
            return Missed(kind.reason)
        except Exception:  # the call's own, which the process beside would report once more
            if forked:
                self.compilers.end_of(kind)
                kind.processes, kind.wrong = kind.processes - 1, kind.wrong + 1
            raise

    def _in_a_loop(self, call: ForwardCall) -> Any:
        """The answer of eager mode to a call that runs touched experts one after another."""
        try:
            return self._run_eagerly(call)
        except NeedsGraph as refusal:
            why = f"{refusal}. {SWITCH}"
            raise LastingRefusal(call.forward.looping, "always", why).error() from None

    def _run_eagerly(self, call: ForwardCall) -> Any:
        run = partial(self._eager.run, call.forward.in_python, call.args, call.kwargs)
        result = self.in_python(call, run)
        self.eager_calls += 1
        return result

    def in_python(self, call: ForwardCall, run: Callable[[], T]) -> T:
        """The result of `run`, a forward of the call in eager mode."""
        session, runtime = call.session, self._program.runtime
        if session.requests.tokens is not None and not session.requests.packed:
            raise NeedsGraph("tokens of one request have slots of their own")
        if runtime.gates is not None:
            raise NeedsGraph("modules choose among the adapters of a request")
        no_grad = torch.no_grad() if torch.is_grad_enabled() else nullcontext()
        active, threads = runtime.active, torch.get_num_threads()
        try:
            if all(row < 0 for row in runtime.rows):
                runtime.active = False
            if threads > 1 and self.compilers.working:
                # OpenMP's threads wait for the one that shares its core.
                _use_threads(threads - 1, of_new=threads)
            with collection_paused(), no_grad, session.without_mha_fast_path():
                return run()
        finally:
            runtime.active = active
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            self._program.hook_watch.accept_new()

    def look_eagerly(
        self,
        call: ForwardCall,
        read: Callable[[Any], T],
        sites: list[tuple[str, Tensor]] | None = None,
    ) -> T:
        """As `EagerTier.look`, for the call."""
        look = partial(self._eager.look, call.forward.in_python, call.args, call.kwargs)
        return self.in_python(call, partial(look, read, sites))

    def _verdict(self, call: ForwardCall) -> tuple[str, str]:
        """`ComparedCall.verdict`, in the process beside."""
        from lorafx.runtime.beside.comparison import ComparedCall

        return ComparedCall(call, partial(self.look_eagerly, call)).verdict()

    # --- what is seen of it ---

    def status(self, session: Session) -> Status:
        """The present state. No lock is waited for: a running call looks at processes itself."""
        if session.lock.acquire(blocking=False):
            try:
                self.compilers.look()
            finally:
                session.lock.release()
        kinds = [KindStatus(kind.name, kind.calls, kind.tier, kind.reason) for kind in self._kinds]
        saved = sum(kind.saved for kind in self._kinds)
        return Status(tuple(kinds), len(session.records) + saved)

    def busy(self, session: Session) -> bool:
        """Whether a graph is being compiled beside, or what the next call loads is prepared."""
        return bool(self.status(session).compiling) or preparing()


def _use_threads(number: int, *, of_new: int) -> None:
    """Have this thread compute with so many threads of OpenMP, and threads that are born from now
    on with others: they take the number that was set last, on whichever thread."""
    torch.set_num_threads(number)
    setter = threading.Thread(target=torch.set_num_threads, args=(of_new,), daemon=True)
    setter.start()
    setter.join()


_ALIVE: weakref.WeakSet[Tiers] = weakref.WeakSet()


def _after_fork() -> None:
    for tiers in list(_ALIVE):
        tiers.compilers.forget()


os.register_at_fork(after_in_child=_after_fork)
