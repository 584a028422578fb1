"""What benchmarks/moe.py measures: adapters of every expert and router, floors, PEFT's refusal."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafx

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import moe_cases

    with torch.no_grad():
        yield moe_cases


def test_a_mixed_batch_is_right_and_touches_all_kinds_of_sites(cases: Any, tmp_path: Path) -> None:
    model = cases.build_model("tiny", 1, torch.float32)
    paths = cases.save_adapters(model, tmp_path, 2)
    options = {"lowering": "reference"}
    cm = lorafx.compile(copy.deepcopy(model), paths, options=options, dynamic=False)
    names = {site.path.rpartition(".")[2] for site in cm.sites}
    assert names == {*cases.TARGETS, "gate_up_proj", "down_proj", "gate"}
    ids = torch.arange(6).view(3, 2)

    def serve(adapters: Any) -> torch.Tensor:
        return cm(input_ids=ids, use_cache=False, adapter_names=adapters).logits

    error, _ = cases.errors(model, paths, serve, ids)
    assert error < 1e-5
    base = serve([None] * 3)
    changed = (serve(["a0", "a1", None]) - base).abs().amax((1, 2))
    assert (changed > 1e-3).tolist() == [True, True, False]


def test_peft_refuses_mixed_batches_here(cases: Any, tmp_path: Path) -> None:
    assert "mixed adapter batches" in cases.peft_refusal(tmp_path)
