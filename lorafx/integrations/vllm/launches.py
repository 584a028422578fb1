"""`lorafx::launch_delta_`, the delta by generated Triton kernels, which are chosen by rows.

    rows ≤ FEW     "gemv", a row at a time
    rows ≤ SOME    "segments" with tiles for a step of decoding
    more           "segments" with tiles for prompts
    an embedding   "embedding"

vLLM compiles one graph for steps of any size, but captures a CUDA graph for each size, so the
choice is made when the operator runs. Kernels read slots and ranks on the device, from tensors at
fixed addresses: a captured launch stays right when those change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafx.errors import LoweringError
from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.ops.op_library import BANK, BankArgs, check_bank, check_rows, define
from lorafx.kernels.triton import build as triton_build
from lorafx.kernels.triton import ops as triton_ops
from lorafx.kernels.triton.source import TritonSpec

#: Guesses from the cost model's floors; not measured inside of vLLM.
FEW, SOME = 16, 256
#: Rows for which tiles of prompts are chosen.
PROMPT_ROWS = 4096

#: Ids of kernels for few, some and many rows.
Launches = tuple[int, int, int]


def launches(spec: DeltaSpec, device: torch.device) -> Launches | None:
    """The kernels of `spec`, made if need be; None where none are generated."""
    if not spec.supported():
        return None
    choices = [("gemv", FEW), ("segments", SOME), ("segments", PROMPT_ROWS)]
    if spec.embedding:
        choices = [("embedding", FEW)] * 3
    few, some, many = (
        triton_build.build(TritonSpec(spec), strategy, rows_hint=rows, device=device)
        for strategy, rows in choices
    )
    if few is None or some is None or many is None:
        raise LoweringError(f"no Triton kernels for {spec}")
    return few, some, many


def launch_delta_(y: Tensor, x: Tensor, bank: BankArgs, few: int, some: int, many: int) -> None:
    """Adds to each row of y (M, N) the delta of the slot of its place; x is (M, K), or ids (M,)."""
    rows = y.shape[0]
    kernel = few if rows <= FEW else some if rows <= SOME else many
    embedding = not x.is_floating_point()
    run = triton_ops.triton_embedding_delta_ if embedding else triton_ops.triton_delta_
    run(y, x, *bank, 1, kernel)


def _fake(y, x, bank: BankArgs, few, some, many) -> None:
    check_bank("launch_delta_", bank)
    check_rows("launch_delta_", x.shape[:1], y.shape[:1], 1)


define(
    f"launch_delta_(Tensor(a!) y, Tensor x, {BANK}, int few, int some, int many) -> ()",
    launch_delta_,
    _fake,
)
