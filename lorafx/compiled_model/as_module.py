"""The part of a compiled model that behaves as the `nn.Module` whose place it takes.

| name on the compiled model | what it is |
|---|---|
| `_orig_mod` | the model that was given, as in torch's OptimizedModule |
| of `CompiledModel` and `nn.Module`, in their classes | their own |
| any other: read, set or deleted | the model's (lorafx.compiled_model.names) |

So parameters, children, hooks, settings and the training mode are those of the model: there is one
dictionary of each. `isinstance` says what the model is, beside `CompiledModel`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from lorafx.errors import CaptureError, ConfigError
from lorafx.generation.generate import CompiledGenerate
from lorafx.runtime.forwards import CompiledForwards
from lorafx.runtime.marking import warn_training
from lorafx.runtime.session import Session


class AsModule(nn.Module):
    """A compiled model as others hold it; its forward is that of `CompiledModel`."""

    # A slot is a name of the class, so that it is this object's own.
    __slots__ = ("_entries", "_generation", "_orig_mod", "_session")
    _orig_mod: nn.Module
    _session: Session
    _entries: CompiledForwards
    _generation: CompiledGenerate

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._orig_mod)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return vars(self._orig_mod)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            self._session.patched = None if value == MethodType(type(self).forward, self) else value
        if hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            setattr(self._orig_mod, name, value)

    def __delattr__(self, name: str) -> None:
        if name == "forward":
            self._session.patched = None
        if hasattr(type(self), name):
            object.__delattr__(self, name)
        else:
            delattr(self._orig_mod, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *dir(self._orig_mod)})

    def train(self, mode: bool = True) -> Self:
        """As for any module. Warns where training mode begins, which makes dropout active."""
        if mode and not self._orig_mod.training:
            warn_training(self._orig_mod, stacklevel=2)
        self._session.trains = mode
        self._orig_mod.train(mode)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """As for the model."""
        self._orig_mod.apply(fn)
        return self

    def get_submodule(self, target: str) -> nn.Module:
        """The module at a path in the model; this object for the empty path."""
        return self._orig_mod.get_submodule(target) if target else self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The `state_dict` of the model, with its names."""
        return self._orig_mod.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """The `load_state_dict` of the model, with its names. `load_weights` also takes other names
        and checks everything before it writes.

        Raises:
            ConfigError: `assign`, which would replace the parameters that graphs take.
            BatchError: a call is running on this thread.

        It also raises what the model's own method raises.
        """
        if assign:
            raise ConfigError(
                "load_state_dict(assign=True) would replace the parameters that the graphs of this "
                "compiled model take; leave out assign, which writes into them, or detach() first"
            )
        self._session.refuse_running("load_state_dict()")
        with self._session.weights_lock, self._session.lock:
            return self._orig_mod.load_state_dict(state_dict, strict)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to`, `half`, `cuda` and the like, which change nothing: the model must fit already.

        Raises:
            CaptureError: the graphs and banks are for another dtype or device. Nothing has changed.
        """
        tensors = [*self.parameters(), *self.buffers()]
        for dtype, device in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):
            converted = fn(torch.empty(0, dtype=dtype, device=device))
            if (converted.dtype, converted.device) != (dtype, device):
                raise CaptureError(
                    f"the graphs and adapters of this compiled model are for {dtype} on {device}, "
                    f"not for {converted.dtype} on {converted.device}: detach() the model, convert "
                    "it, and call lorafx.compile again"
                )
        self._orig_mod._apply(fn, recurse)
        return self

    def compile(self, *_: Any, **__: Any) -> NoReturn:
        """Raises CaptureError: this model is compiled already."""
        raise CaptureError(
            "lorafx.compile has compiled this model; call it as it is. Settings of the compiler "
            "are given there: lorafx.compile(model, adapters, mode=..., options={...}). To call "
            "torch.compile yourself, detach() the model, lorafx.attach(model, adapters), and name "
            'the backend: torch.compile(model, backend="lorafx")'
        )

    def _refuse_backward_hook(self, *_: Any, **__: Any) -> NoReturn:
        """Raises CaptureError: nothing runs backward."""
        raise CaptureError(
            "a compiled model is for inference, and a backward hook would never run: register it "
            "on the model that is trained"
        )

    register_backward_hook = register_full_backward_hook = _refuse_backward_hook
    register_full_backward_pre_hook = _refuse_backward_hook

    def __reduce_ex__(self, _: Any) -> NoReturn:
        """Raises CaptureError for copies and pickles: a copy of the graphs would serve the weights
        of the original."""
        raise CaptureError(
            "a compiled model cannot be copied or pickled: its graphs and locks belong to this "
            "process and to these weights. Copy or save the model that was given to "
            "lorafx.compile, before it is compiled or after detach(); "
            "lorafx.detach(copy.deepcopy(compiled._orig_mod)) is a plain copy of it"
        )

    __copy__ = __deepcopy__ = lambda self, _=None: self.__reduce_ex__(_)  # not the model's


def refusing_backward(output: Any) -> Any:
    """`output` of a model, whose loss requires gradients if they are enabled, as the model's own
    would; its backward raises CaptureError."""
    if torch.is_grad_enabled() and isinstance(output, dict):
        loss = output.get("loss")
        if isinstance(loss, Tensor) and loss.is_floating_point():
            leaf = torch.zeros_like(loss).requires_grad_()
            leaf.register_hook(_refuse_gradient)
            output["loss"] = loss + leaf
    return output


def _refuse_gradient(_: Tensor) -> NoReturn:
    raise CaptureError(
        "a compiled model is for inference, and its loss has no gradients: train with PEFT on the "
        "plain model, or on what detach() returns, and load what it saves by "
        "load_adapter(folder, name); torch.no_grad() around a call gives a loss that asks for none"
    )


def signature_of(model: type[nn.Module], forward: Callable[..., Any]) -> inspect.Signature:
    """The signature of the model's own forward, with the keywords that `forward` adds."""
    signature = inspect.signature(model.forward)
    parameters = dict(signature.parameters)
    open_ended = [name for name, item in parameters.items() if item.kind is item.VAR_KEYWORD]
    removed = [parameters.pop(name) for name in open_ended]
    for name, parameter in inspect.signature(forward).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            parameters.setdefault(name, parameter)
    return signature.replace(parameters=[*parameters.values(), *removed])


def special_methods(model: type[nn.Module]) -> dict[str, Any]:
    """Methods of a container that the model's class has, which Python looks up in classes."""

    def method(name: str) -> Callable[..., Any]:
        return lambda self, *args: getattr(self._orig_mod, name)(*args)

    names = ("__len__", "__iter__", "__getitem__", "__contains__")
    return {name: method(name) for name in names if hasattr(model, name)}
