"""`lorafx::add_each_`: adds one number to each of several tensors, in place.

A static cache has a length of its own for each layer, and each step adds the new tokens to all of
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorafx.kernels.ops.op_library import define
from lorafx.torch_internals.operators import _foreach_add_

SCHEMA = "add_each_(Tensor(a!)[] tensors, SymInt number) -> ()"


def add_each(tensors: Sequence[Tensor], number: int) -> None:
    _foreach_add_(list(tensors), number)


def add_each_fake(tensors: Sequence[Tensor], number: int | torch.SymInt) -> None:
    pass


define(SCHEMA, add_each, add_each_fake)

ADD_EACH = torch.ops.lorafx.add_each_.default
