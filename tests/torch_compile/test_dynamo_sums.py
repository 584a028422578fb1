"""Sums of adapters in blocks of `lorafx.adapters`, against W + Σ w ΔW."""

from __future__ import annotations

import pytest
import torch
from attached import compiled, fresh_dynamo, graphs, served
from dense_merge import TOLERANCE, Case, error
from sums import SumCase
from tiny_models import FAMILIES

import lorafx
from lorafx.errors import BatchError

__all__ = ["fresh_dynamo"]
MIX = {"a0": 0.7, "a1": 0.3}


def test_blocks(plain: Case) -> None:
    torch.manual_seed(0)
    case, inputs = SumCase.of(plain), FAMILIES["plain"].inputs(3, 4)
    config, options = lorafx.LoraConfig(max_rank=16), {"lowering": "reference"}
    model = lorafx.attach(case.model(), config, adapters=case.folders, options=options)
    call = compiled(model, dynamic=False)
    for names in ([MIX, None, {"a2": 0.5}], ["a1", {"a1": -2.0, "a0": 1.0}, MIX]):
        got = served(call, model, names, inputs)  # type: ignore[arg-type]
        assert error(got, case.expected(names, inputs)) <= TOLERANCE  # type: ignore[arg-type]
    got = served(call, model, MIX, inputs)  # type: ignore[arg-type]
    assert error(got, case.expected([MIX] * 3, inputs)) <= TOLERANCE  # type: ignore[list-item]
    assert graphs(model) == 1
    with lorafx.adapters(model, [MIX]), pytest.raises(BatchError, match="being served"):
        lorafx.unload_adapter(model, "a0")
