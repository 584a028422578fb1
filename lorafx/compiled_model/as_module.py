"""A compiled model as a module that other libraries handle.

Its parameters, buffers and modules are the model's, under the names that they have there; `forward`
has the signature of the model's own, by which Trainer, collators and pipelines choose what they
pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor, nn

from lorafx.errors import CaptureError, ConfigError
from lorafx.runtime.marking import warn_training

if TYPE_CHECKING:
    from lorafx.runtime.session import Session


class AsModule(nn.Module):
    """The part of `CompiledModel` that is an `nn.Module` in the place of its model."""

    model: nn.Module
    _session: Session

    def _stand_for(self, model: nn.Module) -> None:
        """Have the parameters, buffers and children of `model`: the very dictionaries."""
        shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        # Past __setattr__, which would make the model a child.
        vars(self).update({name: vars(model)[name] for name in shared}, model=model)

    def train(self, mode: bool = True) -> Self:
        """As of any module. Training mode is warned of: it makes the model's dropout active."""
        if mode:
            warn_training(self.model, stacklevel=2)
        self.model.train(mode)
        self.training = mode
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """As of the model."""
        self.model.apply(fn)
        return self

    def get_submodule(self, target: str) -> nn.Module:
        """The module at a path of the model's; this one at the empty path."""
        return self.model.get_submodule(target) if target else self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the model, with its names."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """That of the model, with its names. `load_weights` also takes other names, checks all
        before it writes, and updates a merged adapter.

        Raises:
            ConfigError: `assign`, which would replace the parameters that graphs take.
            BatchError: a call is running on this thread.

        It also raises what the model's own raises.
        """
        if assign:
            raise ConfigError(
                "load_state_dict(assign=True) would replace the parameters that the graphs of this "
                "compiled model take; leave out assign, which writes into them, or detach() first"
            )
        self._session.refuse_running("load_state_dict()")
        with self._session.weights_lock, self._session.lock:
            return self.model.load_state_dict(state_dict, strict)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to`, `half`, `cuda` and the like: nothing, where the model is so already.

        Raises:
            CaptureError: the graphs and banks are for another dtype or device. Nothing has changed.
        """
        tensors = [*self.parameters(), *self.buffers()]
        for dtype, device in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):
            made = fn(torch.empty(0, dtype=dtype, device=device))
            if (made.dtype, made.device) != (dtype, device):
                raise CaptureError(
                    f"the graphs and adapters of this compiled model are for {dtype} on {device}, "
                    f"not for {made.dtype} on {made.device}: detach() the model, convert it, and "
                    "call lorafx.compile again"
                )
        self.model._apply(fn, recurse)
        return self

    def compile(self, *_: Any, **__: Any) -> NoReturn:
        """Raises CaptureError: this model is compiled already."""
        raise CaptureError(
            "lorafx.compile has compiled this model; call it as it is. Settings of the compiler "
            "are given there: lorafx.compile(model, adapters, mode=..., options={...}). To call "
            "torch.compile yourself, detach() the model, lorafx.attach(model, adapters), and name "
            'the backend: torch.compile(model, backend="lorafx")'
        )

    def __reduce_ex__(self, _: Any) -> NoReturn:
        """Raises CaptureError for copies and pickles: a copy of the graphs would serve the weights
        of the original."""
        raise CaptureError(
            "a compiled model cannot be copied or pickled: its graphs and locks belong to this "
            "process and to these weights. Copy or save the model that was given to "
            "lorafx.compile, before it is compiled or after detach(); "
            "lorafx.detach(copy.deepcopy(compiled.model)) is a plain copy of it"
        )


def refusing_backward(output: Any) -> Any:
    """`output` of a model, with a loss that requires gradients where they are switched on, as the
    model's own would. Its backward raises CaptureError."""
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
    found = dict(signature.parameters)
    last = [name for name, parameter in found.items() if parameter.kind is parameter.VAR_KEYWORD]
    rest = [found.pop(name) for name in last]
    for name, parameter in inspect.signature(forward).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            found.setdefault(name, parameter)
    return signature.replace(parameters=[*found.values(), *rest])
