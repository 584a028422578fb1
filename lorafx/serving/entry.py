"""Entries: a module's forward, or another method, compiled for one program, with its batch set up
on the host.

Once per call: the number of requests, each request's slot, the checks; then the compiled forward
runs and reads only tensors.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorafx.capture.failures import explained, own_error
from lorafx.capture.traced import NotCompiled, Traced
from lorafx.errors import (
    CaptureError,
    LorafxError,
    LorafxWarning,
    MatchError,
    OutOfRangeError,
    ReplacedModuleError,
)
from lorafx.model.attachment import MARKS
from lorafx.model.experts import LOOP, loops
from lorafx.program.program import Program
from lorafx.program.roles import RoleTable
from lorafx.program.row_dims import IMAGES
from lorafx.progress import LOG
from lorafx.serving.base_roads import BaseRoads, Road
from lorafx.serving.call_inputs import check_inputs, plain_tokens
from lorafx.serving.tracked import tracked
from lorafx.session.resting import refuse_elsewhere
from lorafx.session.session import Session
from lorafx.torch_internals.compat import is_recompile_limit, mark_fixed_shape

if TYPE_CHECKING:  # what it needs of torch may be missing where nothing is saved
    from lorafx.saved_graphs.saved_graphs import SavedGraphs


class Entry:
    """One module's forward, compiled, or another method of it (`function`). Called in place of it,
    by users and by `generate`."""

    def __init__(
        self,
        session: Session,
        module: nn.Module,
        function: Callable[..., Any],
        name: str = "forward",
        *,
        per_token: bool = False,
        packed: bool = False,
    ) -> None:
        self.session = session
        self.module = module
        self.function = function
        self.is_forward = name == "forward"
        self.name = f"the {name} of {type(module).__name__}"
        row_dims = session.program.config.row_dims
        self.roles = RoleTable(module, row_dims, function, packed=packed)
        self.per_token = per_token
        self.target = _target(session.program, module, function) if name == "forward" else function
        #: By what stands where sites stood (`SiteWatch`) and the hooks of users (`HookWatch`), the
        #: last such state and that of the model as given: guards alone would not tell them apart.
        self.by_state = {_AS_GIVEN: self._new()}
        #: That of the last call.
        self.traced = self.by_state[_AS_GIVEN]
        #: Calls of the base model run in Python: a compiler failed on them.
        self.in_python = False
        self.base_roads = BaseRoads(session)
        self.experts = [site for site in session.program.sites if site.expert_weight is not None]
        functools.update_wrapper(self, function)

    def compiles(self, function: Callable[..., Any]) -> bool:
        """Whether this is what it compiles. Each access to a method makes a new one."""
        own = self.function
        return function is own or (
            isinstance(own, MethodType)
            and isinstance(function, MethodType)
            and function.__func__ is own.__func__
            and function.__self__ is own.__self__
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        refuse_elsewhere(session)
        running = session.running.in_forward(session.program.runtime.rows)
        return session.run(running, functools.partial(self._serve, *args, **kwargs))

    def _serve(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        named = self.roles.bind(args, kwargs) if args else kwargs
        if args and self.roles.by_name(args):  # one graph for both ways to write a call
            args, kwargs = (), named
        if not args:
            named = kwargs = plain_tokens(kwargs)
        if self.module is session.program.model and self.is_forward:
            check_inputs(self.roles, named)
        session.set_batch(self.roles, self.roles.spread(named))
        _fix_image_sizes(named)
        session.program.pack_watch.check()
        session.program.quantised.settle_again()
        if session.program.runtime.active:
            self._refuse_loops()
            return self._run(args, kwargs)
        if self.in_python:
            return self._in_python(*args, **kwargs)
        *others, last = self.base_roads.roads(warming=session.running.warming)
        for road in others:
            try:
                return self._on_road(road, args, kwargs)
            except NotCompiled:
                pass
            except OutOfRangeError:
                raise
            except LorafxError as error:
                self.base_roads.apart = True
                LOG.info("%s without an adapter has graphs of its own now: %s", self.name, error)
                if not self.traced.unstarted:
                    raise
        return self._on_road(last, args, kwargs)

    def _on_road(self, road: Road, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Serve a call without an adapter.

        Raises:
            NotCompiled: there is no graph yet, and `road` compiles none.
        """
        runtime, records = self.session.program.runtime, self.session.backend.records
        before = len(records)
        runtime.active = road.lent
        try:
            return self._run(args, kwargs, compiled=road.compiled)
        finally:
            runtime.active = False
            self.base_roads.owns |= not road.lent and len(records) > before

    def _run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, compiled: bool = False
    ) -> Any:
        """What the model returns; `compiled`: by a graph that is compiled already."""
        session = self.session
        sites, hooks = session.program.site_watch, session.program.hook_watch
        state = sites.state, hooks.look()
        traced = self.traced = self._traced(state)
        traced.unstarted, traced.compiled_only = False, compiled
        try:
            run = functools.partial(self._result, traced, *args, **kwargs)
            ungraded = torch.no_grad() if torch.is_grad_enabled() else nullcontext()
            with ungraded, session.module_paths():
                return tracked(session, run)
        except NotCompiled:
            raise
        except BaseException as error:
            own = own_error(error)
            if isinstance(own, ReplacedModuleError):
                raise own from None
            raised = "; ".join(dict.fromkeys(traced.given_up.values()))
            traced.given_up.clear()
            if is_recompile_limit(error):
                limit = session.program.options.recompile_limit
                raise CaptureError(
                    f"{type(self.module).__name__} has {limit} graphs, as many as "
                    f"Options.recompile_limit allows, and this call needs one more: {error}"
                ) from error
            if raised and isinstance(error, LorafxError):
                # The consequence; the model's own error is what the caller can do something about.
                raise type(error)(
                    f"{error}. {type(self.module).__name__} runs in pieces, because it "
                    f"raised an error when this call was traced: {raised}"
                ) from error
            if isinstance(error, LorafxError):
                raise
            if own is not None:
                raise own from error
            failure = self._failure(error)
            if failure is None:
                raise
            if not (self.in_python and traced.unstarted):
                raise failure from error
            warnings.warn(str(failure), LorafxWarning, stacklevel=2)
            return self._in_python(*args, **kwargs)
        finally:
            traced.compiled_only = False
            hooks.take_over()
            if sites.state != state[0]:  # noticed when a graph was captured
                self.by_state.pop(state, None)

    def _failure(self, error: BaseException) -> LorafxError | None:
        """What to raise for a failure of a compiler. The base model can answer by itself: after
        one of its calls has failed so, they run in Python."""
        model = type(self.module).__name__
        program = self.session.program
        if program.runtime.active:
            served = "are served as before"
            if program.runtime.uniform and program.runtime.rows[0] < 0:
                served = "have graphs of their own from now on"
            return explained(error, model, f"Calls without an adapter {served}")
        failure = explained(error, model, "Calls without an adapter run in Python from now on")
        self.in_python = self.in_python or failure is not None
        return failure

    def _in_python(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.target(*args, **kwargs)

    def _new(self) -> Traced:
        session = self.session
        saved = self._saved()
        return Traced(
            self.target,
            session.backend.per_token if self.per_token else session.backend,
            name=self.name,
            dynamic=session.dynamic,
            recompile_limit=session.program.options.recompile_limit,
            sizes_by_data=lambda: session.program.quantised.sizes_by_data,
            keep_guards=session.backend.keep_guards if saved is None else saved.keep_guards,
            saved=saved,
        )

    def _saved(self) -> SavedGraphs | None:
        """The graphs that other processes saved of this entry, where `Options.cache` asks."""
        option = self.session.program.options.cache
        if not option:
            return None
        paths = {id(module): path for path, module in self.session.program.model.named_modules()}
        entry = {
            "function": self.target,
            "module": paths.get(id(self.module)),
            "name": self.name,
            "per token": self.per_token,
            "packed": self.roles.packed,
            "dynamic": self.session.dynamic,
        }
        from lorafx.saved_graphs.saved_graphs import SavedGraphs

        return SavedGraphs(self.session.backend, option, entry)

    def _traced(self, state: tuple[int, int]) -> Traced:
        if state not in self.by_state:
            kept = self.by_state.get(_AS_GIVEN)
            self.by_state = {} if kept is None else {_AS_GIVEN: kept}
            self.by_state[state] = self._new()
        return self.by_state[state]

    def _result(self, traced: Traced, *args: Any, **kwargs: Any) -> Any:
        """Raises CaptureError where it is yet to be computed, without the batch that is set up."""
        result = traced.call(*args, **kwargs)
        if isinstance(result, (GeneratorType, CoroutineType, AsyncGeneratorType)):
            raise CaptureError(
                f"{self.name} is a {type(result).__name__}, whose body runs after the call "
                "has ended, without its adapters; return what it yields"
            )
        return result

    def _refuse_loops(self) -> None:
        """Refuse adapters of experts that the base is told to run one after another.

        Dynamo gives such a model up in pieces; what it asks about those says nothing of experts.

        Raises:
            MatchError: the batch has some.
        """
        program = self.session.program
        looping = [site for site in self.experts if loops(site.module) and program.is_touched(site)]
        if looping:
            names = ", ".join(site.path for site in looping)
            raise MatchError(f"LoRA cannot be applied at {names}: {LOOP}")


#: The state of a model whose modules and hooks are those that it had at first.
_AS_GIVEN = (0, 0)


def _fix_image_sizes(named: Mapping[str, Any]) -> None:
    """Only the number of requests may vary in a graph that takes images."""
    for name in IMAGES:
        value = named.get(name)
        if isinstance(value, Tensor) and value.dim() == 4:
            mark_fixed_shape(value, (1, 2, 3))


def _target(program: Program, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """What Dynamo traces, where `forward` is the module's own. A module that is a site itself is
    traced with its hooks. Those of a part of the model that are no marks run around its entry,
    where the part is called."""
    if all(site.module is not module for site in program.sites):
        return forward
    if module is program.model:

        def call(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        return call
    marks = [hook for hook in module._forward_hooks.values() if isinstance(hook, MARKS)]

    def marked(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        for mark in marks:
            changed = mark(module, args, kwargs, output)
            output = output if changed is None else changed
        return output

    return marked


def entered(frame: FrameType) -> bool:
    """True for the frame of a running entry, which calls the program with a call's arguments."""
    return frame.f_code is Entry._serve.__code__
