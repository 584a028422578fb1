"""What users call on a model that they compile themselves.

with lorafx.adapters(model, ["sql", None]):      its calls serve these requests
lorafx.load_adapter(model, folder, "sql")        and `unload_adapter`, `detach`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Never

from torch import nn

from lorafx.adapter_store.names import BASE, AdapterName, one_name
from lorafx.capture.failures import explained, own_error
from lorafx.errors import BatchError, CaptureError
from lorafx.model.marks import detach as remove_marks
from lorafx.program.stack import unwrapped
from lorafx.serving.compiled import compiled_of
from lorafx.serving.names import refuse_arguments
from lorafx.session.loading import asked_name
from lorafx.session.loading import load_adapter as load_into
from lorafx.session.requests import checked_names
from lorafx.torch_compile.attached import AttachedSession, marked_session, marks_of, session_of
from lorafx.torch_compile.pending import first_call, until_marked
from lorafx.torch_compile.tasks import block_of_this_task
from lorafx.torch_internals.compat import is_recompile_limit
from lorafx.torch_internals.entrances import unsupported


def _session_if_marked(model: nn.Module) -> AttachedSession | None:
    """The session of a model that is marked. Raises as `marked_session`."""
    session = session_of(model)
    known = session is None and (marks_of(model) or compiled_of(model) is not None)
    return marked_session(model) if known else session


def _block(
    model: nn.Module, session: AttachedSession | None, names: str | Sequence[str | None] | None
) -> AbstractContextManager[None]:
    session = session or _session_if_marked(model)  # another thread may have marked it
    return until_marked(model, names) if session is None else session.block(names)


@contextmanager
def adapters(
    model: nn.Module, adapter_names: AdapterName | Sequence[AdapterName]
) -> Iterator[None]:
    """Serve each request of the calls inside the block with its own adapter.

    Blocks may be nested; the innermost one counts. When a block ends, also by an exception, what
    was in effect before it is restored. Outside any block the model is the base model. Blocks of
    one model on several threads wait for one another. A call outside any block does not wait, so
    put it into a block of None where other threads serve adapters. Tasks of asyncio share a thread:
    do not await inside a block.

    Args:
        model: what `attach` returned, or a model that is compiled with `lora_config` among the
            options of torch.compile, or what torch.compile returned for either.
        adapter_names: one name per request, in the order of the batch, where None or "__base__" is
            the base model, and {"sql": 0.7, "style": 0.3} a sum of adapters, or one at another
            scale; or a single name, or sum, for all requests. Inside the model's own `generate`
            several consecutive rows may belong to one request, as beams and returned sequences do.

    Raises:
        ConfigError: `adapter_names` is not a list of names, the model carries no LoRA, or an
            adapter can be part of no sum (DoRA, weights of its own).
        UnknownAdapterError: a name that is not loaded.
        CapacityError: more distinct adapters than slots, or a sum of ranks over `max_rank`.
        BatchError: another task of asyncio is inside of a block on this thread.

    Nothing has changed then. For a model that its first call marks, that call raises these.
    Calls inside the block raise what `CompiledModel.forward` raises.
    """
    names: str | Sequence[str | None] | None
    if adapter_names is None or isinstance(adapter_names, (str, Mapping)):
        names = one_name(adapter_names, "adapter_names")
    else:
        names = checked_names(adapter_names)
    model = unwrapped(model)
    try:
        session = _session_if_marked(model)
        first = first_call(model, session is not None)
        with block_of_this_task(), first, _block(model, session, names):
            yield
    except Exception as error:
        failure = own_error(error) or explained(error, type(model).__name__) or unsupported(error)
        if failure is not None:
            raise failure from error
        if is_recompile_limit(error):
            raise CaptureError(
                f"{type(model).__name__} has as many graphs as Options.recompile_limit "
                f"allows, and this call needs one more; raise the limit: {error}"
            ) from error
        raise


def load_adapter(
    model: nn.Module,
    source: Any,
    name: str | None = None,
    *,
    adapter_name: str | None = None,
    strict: bool | None = None,
    **elsewhere: Never,
) -> None:
    """As `CompiledModel.load_adapter`, for a marked model.

    Raises:
        ConfigError: the model is not marked.
        CheckpointError, UnsupportedAdapterError, CapacityError: nothing has changed then.
    """
    refuse_arguments("lorafx.load_adapter", (), elsewhere)
    session = marked_session(model)
    load_into(session, source, asked_name(session, name, adapter_name), strict)


def unload_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter of a marked model and free its slot.

    Raises:
        ConfigError: the model is not marked.
        UnknownAdapterError: it is not loaded.
        BatchError: the surrounding block serves it.
    """
    session = marked_session(model)
    with session.lock:
        if name != BASE and session.asks_for(name):
            raise BatchError(f"{name!r} is being served; unload it after the block")
        session.locks.streams.follow(session.accelerators)
        session.store.unload(name)
        session.forget_served()


def detach(model: nn.Module) -> nn.Module:
    """Take LoRA off a marked model, or one that `lorafx.compile` serves, and return the model.

    This also works for copies and pickles of a marked model, which have no session. A
    `peft.PeftModel` that was attached gets its wrappers back.

    Raises:
        CaptureError: called inside a block of `adapters`.
        BatchError: called inside a call of the compiled model.
    """
    compiled = compiled_of(unwrapped(model))
    if compiled is not None:
        return compiled.detach()
    session = session_of(model)
    if session is not None:
        with session.lock:
            session.close()
        return session.program.model
    remove_marks(model)
    return model
