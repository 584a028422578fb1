"""Row marks: hooks on quantised modules without LoRA, so that later modules can carry LoRA.

    y ← rows_of(x, y)      in traces of calls with adapters; nothing elsewhere

No ownership rule covers their kernels. A module of a registered class computes y = x Wᵀ (or
W[ids]), so row m of y has the owner of row m of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lorafx.kernels.ops.row_ops  # noqa: F401  (defines torch.ops.lorafx.rows_of)
from lorafx.model.runtime import Runtime
from lorafx.registry import Eligible
from lorafx.torch_internals.compat import tracing


@dataclass(eq=False)
class RowMark:
    """Hook of one module, for `register_forward_hook(mark, with_kwargs=True)`.

    Attributes:
        runtime: the batch of the model.
        out_features: N.
        embedding: the module takes ids (…).
    """

    runtime: Runtime
    out_features: int
    embedding: bool

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The output as the rows of the first argument, or None where it stays as it is."""
        if not self.runtime.active or not tracing() or not args:
            return None
        x = args[0]
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or output.dim() == 0:
            return None
        rows = x.shape if self.embedding else x.shape[:-1]
        if output.shape[:-1] != rows or output.shape[-1] != self.out_features:
            return None
        return torch.ops.lorafx.rows_of(x, output)


def row_mark(module: nn.Module, entry: Eligible, runtime: Runtime) -> RowMark:
    """The mark of such a module."""
    return RowMark(runtime, entry.sizes(module)[1], entry.kind == "embedding")
