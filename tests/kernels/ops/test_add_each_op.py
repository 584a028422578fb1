"""`lorafx::add_each_` adds to each of its tensors, in place."""

from __future__ import annotations

import torch
from torch.library import opcheck

from lorafx.kernels.ops.add_each_op import ADD_EACH


def test_adds_in_place_and_checks() -> None:
    tensors = [torch.tensor(2), torch.tensor(5), torch.tensor(7, dtype=torch.int32)]
    ADD_EACH(tensors, 3)
    assert [int(tensor) for tensor in tensors] == [5, 8, 10]
    opcheck(ADD_EACH, (tensors, 3))
