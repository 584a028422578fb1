"""Methods of the model that are reached through the compiled one: `cm.encode(x)`.

| method | what happens |
|---|---|
| of the model's own class | served as a call is: compiled where an adapter is wanted |
| of `nn.Module` and transformers' base classes | passed through: they run no layer | | those of
`REFUSED` | raise: they run the model where no adapter can be served, or change it | | those of
`GENERATING` | run in Python, and what they call is the compiled model's `generate` |
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from lorafx.errors import CaptureError
from lorafx.model.keywords import BY_ROW, refuse_slips
from lorafx.serving.generation import generating_in_methods
from lorafx.serving.refused import REFUSED, refuse
from lorafx.session.requests import checked_names
from lorafx.session.resting import wanted
from lorafx.torch_internals.compat import untraced

if TYPE_CHECKING:
    from lorafx.serving.compiled import CompiledModel

#: Methods of transformers' base classes that call `generate` and run no layer themselves.
GENERATING = ("heal_tokens",)

#: (module, class) of base classes whose methods do not run the model but for those above and
#: `generate`.
_BASES = (
    ("transformers.modeling_utils", "PreTrainedModel"),
    ("transformers.generation.utils", "GenerationMixin"),
    ("huggingface_hub", "ModelHubMixin"),
)


def delegated(compiled: CompiledModel, name: str, value: Any) -> Any:
    """What `compiled` gives for `name`, which is `value` on its model."""
    if not isinstance(value, MethodType) or not isinstance(value.__self__, nn.Module):
        return value
    owner = value.__self__
    for base in _base_classes():
        if isinstance(owner, base) and hasattr(base, name):
            if base is not nn.Module and name in REFUSED:
                return functools.partial(refuse, name, REFUSED[name])
            return _served(compiled, owner, value) if name in GENERATING else value
    inside = owner is compiled.model or any(owner is part for part in compiled.model.modules())
    return _served(compiled, owner, value) if inside else value


def _base_classes() -> list[type]:
    found: list[type] = [nn.Module]
    for module, name in _BASES:
        known = getattr(sys.modules.get(module), name, None)
        if isinstance(known, type):
            found.append(known)
    return found


def _served(compiled: CompiledModel, owner: nn.Module, method: MethodType) -> Callable[..., Any]:
    session = compiled._session
    own_argument = "adapter_names" in inspect.signature(method).parameters

    @untraced
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        refuse_slips(kwargs, method, owner, BY_ROW)
        names: Sequence[str | None] | None = None
        if not own_argument:
            names = checked_names(kwargs.pop("adapter_names", None))
        kept = session.fetched((session.default,) if names is None else names)  # noqa: F841
        with session.lock:
            session.refuse_injected()
            if names is None and (session.default is None or session.running.updating):
                return session.beside_engine(functools.partial(method, *args, **kwargs))
            compiled._check_attached()

            def run() -> Any:
                if session.base.merged is not None or not wanted(session):
                    return method(*args, **kwargs)
                _refuse_lazy(owner, method)
                served: Callable[..., Any] = method
                if method.__name__ not in GENERATING:
                    served = compiled.entry(owner, method=method)
                return generating_in_methods(compiled, served)(*args, **kwargs)

            return session.call(run, names)

    return call


def _refuse_lazy(owner: nn.Module, method: MethodType) -> None:
    plain = inspect.unwrap(method.__func__)
    lazy = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    if any(is_so(plain) for is_so in lazy):
        raise CaptureError(
            f"{type(owner).__name__}.{method.__name__} is a generator or coroutine, whose "
            "body runs after the call has ended, without its adapters; call the compiled "
            "model for each step, or write a method that returns what this one yields"
        )
