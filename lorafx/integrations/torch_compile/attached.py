"""`lorafx.attach`, for models that users call and compile themselves.

    with lorafx.adapters(model, ["sql", None]):      requests of this thread or task
        model(input_ids)                             served as by lorafx.compile

`attach` replaces `model.forward` and `model.generate` by a `Method`, at which Dynamo breaks its
graph. Inside a block a `Method` calls lorafx's compiled model. Elsewhere it calls the method that
it replaced, so that the base model runs, and trains, as its user compiled it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, Never, cast

import torch
from torch import Tensor, nn

from lorafx.adapter_store.names import AdapterName, members, one_name
from lorafx.adapter_store.peft_model import without_wrappers
from lorafx.capture.compiler_failures import lorafx_error_in
from lorafx.capture.saved_graphs.folder import AUTO, folder_of
from lorafx.compiled_model.compiled import (
    CompiledModel,
    compiled_of,
    refuse_compiled,
)
from lorafx.compiled_model.names import refuse_arguments
from lorafx.config import Options
from lorafx.errors import BatchError, CaptureError, ConfigError
from lorafx.model.attachment import detach as remove_marks
from lorafx.model.keywords import refuse_slips
from lorafx.model.marks import MARKS
from lorafx.model.replaced_methods import ReplacedMethod
from lorafx.program.stack import unwrapped
from lorafx.runtime.marking import mark
from lorafx.runtime.requests import BLOCK_THREADS, IN_BLOCKS, Requests, checked_names
from lorafx.torch_internals.versions import entrance

#: How a call chooses adapters, for the message about a misplaced argument.
_BY_BLOCK = {"": "the names to a block around the call: with lorafx.adapters(model, [...])"}
#: The method that runs its model without LoRA in this context; tells the backend the model.
RUNNING: ContextVar[ReplacedMethod | None] = ContextVar("lorafx model as it is", default=None)


class Method(ReplacedMethod):
    """`forward` or `generate` of an attached model. Copies and pickles of the model have the method
    that it replaces."""

    def __init__(self, model: nn.Module, compiled: CompiledModel, name: str) -> None:
        super().__init__(model, name)
        self.compiled = compiled

    @functools.partial(torch.compiler.disable, recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        serve = _call_with_adapters(self, kwargs)
        if serve is not None:
            return serve(*args, **kwargs)
        token = RUNNING.set(self)
        try:
            with self.compiled._session.lock:  # another thread's call may be using slots and marks
                return self.original(*args, **kwargs)
        finally:
            RUNNING.reset(token)


@torch.compiler.disable
def _call_with_adapters(method: Method, kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    """The function that serves this call with the adapters of its block. None outside of blocks,
    and inside a call that is being served."""
    model, compiled = method.model, method.compiled
    if compiled.detached or compiled._session.running_here:
        return None
    refuse_slips(kwargs, method.original, model, _BY_BLOCK)
    requests = IN_BLOCKS.get().get(id(model))
    return None if requests is None else functools.partial(_serve, method, requests)


@torch.compiler.disable
def _serve(method: Method, requests: Requests, *args: Any, **kwargs: Any) -> Any:
    compiled, names = method.compiled, cast(Any, requests)
    if method.name == "generate":
        return compiled.generate(*args, **kwargs, adapter_names=names)
    lora = any(name is not None for name in requests.names)
    if lora and torch.is_grad_enabled() and _wants_gradient(method.model, args, kwargs):
        raise CaptureError(
            "this call needs gradients through lorafx's LoRA, which is for inference only; call "
            "the model inside torch.no_grad() or torch.inference_mode()"
        )
    output = compiled.forward(*args, **kwargs, adapter_names=names)  # the call has run the hooks
    if any(site.module is method.model for site in compiled.sites):
        compiled._session.returned_from = ""
    return output


def _wants_gradient(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    tensors = (item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
    return any(item.requires_grad for item in (*tensors, *model.parameters()))


class FirstCall(ReplacedMethod):
    """`forward` of a model whose first call will attach LoRA, while a block is open around it.

    It calls the original forward. At the first frame the backend attaches LoRA and raises; then
    `forward` is a `Method`, which serves the call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "forward")
        self.lock = threading.RLock()
        self.blocks = 0

    @functools.partial(torch.compiler.disable, recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if id(self.model) not in IN_BLOCKS.get():
            return self.original(*args, **kwargs)
        with self.lock:
            if vars(self.model).get("forward") is self:
                token = RUNNING.set(self)
                try:
                    result = self.original(*args, **kwargs)
                except Exception:
                    if vars(self.model).get("forward") is self:
                        raise
                else:
                    if vars(self.model).get("forward") is self:
                        return result
                finally:
                    RUNNING.reset(token)
        return self.model.forward(*args, **kwargs)


_FIRST_CALLS = threading.Lock()


@contextmanager
def _attaching_at_first_call(model: nn.Module) -> Iterator[None]:
    """A block of a model that is not attached, but compiled with `lora_config` in its options.
    Raises ConfigError at the end if no call has attached LoRA."""
    with _FIRST_CALLS:
        first = vars(model).get("forward")
        if not isinstance(first, FirstCall):
            first = FirstCall(model)
            first.put_in_place()
        first.blocks += 1
    try:
        yield
    finally:
        with _FIRST_CALLS:
            first.blocks -= 1
            if not first.blocks:
                first.put_back()
    if _attached(model) is None:
        raise ConfigError(
            f"no call inside the block has given this {type(model).__name__} LoRA: it was not "
            'called, or not compiled with backend="lorafx" and lora_config among its options. '
            "lorafx.attach(model, lora_config) marks a model before it is called"
        )


def attach(
    model: nn.Module,
    lora_config: Any = None,
    *misplaced: Never,
    adapters: Mapping[str, Any] | Sequence[Any] | None = None,
    options: Options | Mapping[str, Any] | None = None,
    **elsewhere: Never,
) -> nn.Module:
    """Mark `model` for LoRA and return it, for users who call the model and torch.compile
    themselves.

        model = lorafx.attach(model, lora_config)
        compiled = torch.compile(model, backend="lorafx")
        with torch.no_grad(), lorafx.adapters(model, ["sql", None, "chat"]):
            compiled(input_ids)

    Calls in a block of `lorafx.adapters` are served as by `lorafx.compile`, whether or not
    torch.compile was called. Its `mode`, `dynamic` and `options` only apply outside of blocks,
    where the model is the base. A graph that is compiled around the model breaks at the model.
    `lorafx.detach(model)` removes the marks again.

    Args:
        model, lora_config, adapters: as for `compile`. For a `peft.PeftModel` its base model is
            marked and returned.
        options, *misplaced, **elsewhere: as for `compile`.

    It raises what `compile` raises. After an error the model's modules and hooks are as they were.
    """
    refuse_arguments("lorafx.attach", misplaced, elsewhere)
    refuse_compiled(model)
    options = Options.of(options)
    if options.cache and options.cache != AUTO:
        folder_of(options.cache)  # raises if it cannot be used
    with entrance():
        marked = mark(model, lora_config, adapters, options)
        marked.program.pack_watch.pack()
        compiled = CompiledModel(marked.program, marked.attachment, marked.store, dynamic=True)
    model, compiled.attached = compiled._orig_mod, True
    for name in ("forward", "generate"):
        if callable(getattr(model, name, None)):
            if isinstance(first := vars(model).get(name), FirstCall):
                first.put_back()
            method = Method(model, compiled, name)
            marked.attachment.rollback.add(method.put_back)
            method.put_in_place()
    return model


def _attached(model: nn.Module) -> CompiledModel | None:
    """The compiled model that serves an attached model; None for a model without marks. Raises
    ConfigError if lorafx.compile serves the model, or it carries marks of another one."""
    compiled, name = compiled_of(model), type(model).__name__
    if compiled is not None and compiled.attached:
        return compiled
    if compiled is not None:
        raise ConfigError(
            f"lorafx.compile serves this {name}, and this is for models that lorafx.attach marked; "
            "use the compiled model itself: calls take adapter_names=[...], set_adapter(name) "
            "chooses for calls that name none, and load_adapter(folder, name) is a method"
        )
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    marks = [hook for hook in hooks if isinstance(hook, MARKS)]
    if any(mark.runtime.session is not None for mark in marks):
        raise ConfigError(
            f"this {name} contains, or is part of, a model that LoRA was attached to; pass "
            "that model"
        )
    if marks:
        raise ConfigError(
            f"this {name} carries marks of another model, as copies and pickles of a marked one "
            "do; lorafx.detach() it and attach LoRA again"
        )
    return None


def _attached_or_raise(model: nn.Module) -> CompiledModel:
    compiled = _attached(unwrapped(model))
    if compiled is None:
        raise ConfigError(
            f"this {type(model).__name__} carries no LoRA; call lorafx.attach(model, lora_config) "
            "first"
        )
    return compiled


@contextmanager
def adapters(
    model: nn.Module, adapter_names: AdapterName | Sequence[AdapterName]
) -> Iterator[None]:
    """Serve each request of the calls inside the block with its own adapter.

    Blocks may be nested; the innermost one applies. A block applies to the thread, or the task of
    asyncio, that opens it, and to tasks that are started inside. Calls of several threads wait for
    one another. Outside any block the model is the base model.

    Args:
        model: the model that `attach` returned, or one that is compiled with `lora_config` among
            the options of torch.compile, or the result of torch.compile for either.
        adapter_names: one name per request, in the order of the batch, where None or "__base__" is
            the base model, and {"sql": 0.7, "style": 0.3} a sum of adapters, or one at another
            scale; or a single name, or sum, for all requests. Inside the model's own `generate`
            each row has the adapter of the prompt that it comes from.

    Raises:
        ConfigError: `adapter_names` is not a list of names, or the model carries no LoRA.
        UnknownAdapterError: no adapter of this name is loaded.
        CaptureError: PEFT has put adapters into the model after it was attached.

    If the first call of the model attaches LoRA, that call raises these errors. Calls inside the
    block raise what `CompiledModel.forward` raises.
    """
    if adapter_names is None or isinstance(adapter_names, (str, Mapping)):
        requests = Requests((one_name(adapter_names, "adapter_names"),), uniform=True)
    else:
        requests = Requests(checked_names(adapter_names) or ())
    model = without_wrappers(unwrapped(model))
    compiled = _attached(model)
    if compiled is not None:
        compiled._session.refuse_injected()
        for name in requests.names:
            if name is not None:
                compiled._session.store.check_known(name)
    threads = BLOCK_THREADS.setdefault(model, [])
    thread = threading.get_ident()
    with nullcontext() if compiled is not None else _attaching_at_first_call(model):
        threads.append(thread)
        token = IN_BLOCKS.set({**IN_BLOCKS.get(), id(model): requests})
        try:
            _rest(model)
            yield
        except Exception as error:
            cause = lorafx_error_in(error)  # of the backend, at the first frame
            if cause is None:
                raise
            raise cause from error
        finally:
            threads.remove(thread)
            with suppress(ValueError):  # another task closed the generator that opened the block
                IN_BLOCKS.reset(token)
            _rest(model)


def _rest(model: nn.Module) -> None:
    compiled = compiled_of(model)
    if compiled is not None:
        compiled._session.rest()


def load_adapter(
    model: nn.Module,
    source: Any,
    name: str | None = None,
    *,
    adapter_name: str | None = None,
    strict: bool | None = None,
    **elsewhere: Never,
) -> None:
    """Load an adapter into a marked model, as `CompiledModel.load_adapter` does.

    Raises:
        ConfigError: the model is not marked.
        CheckpointError, UnsupportedAdapterError, CapacityError: the adapter cannot be loaded, and
            nothing has changed.
    """
    refuse_arguments("lorafx.load_adapter", (), elsewhere)
    _attached_or_raise(model).load_adapter(source, name, adapter_name=adapter_name, strict=strict)


def unload_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter of a marked model and free its slot.

    Raises:
        ConfigError: the model is not marked.
        UnknownAdapterError: the adapter is not loaded.
        BatchError: the surrounding block serves it.
    """
    compiled = _attached_or_raise(model)
    requests = IN_BLOCKS.get().get(id(compiled._orig_mod))
    served = () if requests is None else requests.names
    if any(request is not None and name in members(request) for request in served):
        raise BatchError(f"{name!r} is being served; unload it after the block")
    compiled.unload_adapter(name)


def detach(model: nn.Module) -> nn.Module:
    """Take LoRA off a marked model, or one that `lorafx.compile` serves, and return the model.

    This also works for copies and pickles of a marked model. A `peft.PeftModel` that was attached
    gets its wrappers back.

    Raises:
        CaptureError: a block of `adapters` is open, on this thread or another one.
        BatchError: called inside a call of the compiled model.
    """
    compiled = compiled_of(model)
    if compiled is None:
        remove_marks(model)
        return model
    # A forked child has one thread, and no blocks of the others.
    alive = {thread.ident for thread in threading.enumerate()}
    if alive.intersection(BLOCK_THREADS.get(compiled._orig_mod, ())):
        raise CaptureError("detach the model after the block of lorafx.adapters, not inside it")
    return compiled.detach()
