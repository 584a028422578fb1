"""`loss.backward()` of a compiled model, which computes no gradients, says so."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from lorafx.errors import CaptureError


class _Refusal(torch.autograd.Function):
    """y = loss; its backward raises. `leaf` requires a gradient, so that y does."""

    @staticmethod
    def forward(_: Any, loss: Tensor, leaf: Tensor) -> Tensor:
        return loss.clone()  # users may write into it

    @staticmethod
    def backward(*_: Any) -> NoReturn:
        raise CaptureError(
            "a compiled model is for inference, and its loss has no gradients: train with PEFT on "
            "the plain model, or on what detach() returns, and load what it saves by "
            "load_adapter(folder, name); torch.no_grad() around a call gives a loss that asks for "
            "none"
        )


def refusing_backward(output: Any) -> Any:
    """`output` of a model, with a loss that requires gradients where they are switched on, as the
    model's own would."""
    if torch.is_grad_enabled() and isinstance(output, dict):
        loss = output.get("loss")
        if isinstance(loss, Tensor) and loss.is_floating_point():
            output["loss"] = _Refusal.apply(loss, torch.ones((), requires_grad=True))
    return output
