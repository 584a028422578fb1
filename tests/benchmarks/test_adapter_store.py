"""What benchmarks/adapter_store.py measures: adapters take turns, and batches are served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("bench")


@pytest.mark.slow
def test_adapters_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import adapter_store

    sizes = adapter_store.Sizes(adapters=8, slots=2, batch=6, prompt=3, new=2, hidden=16, layers=1)
    reference, counts = {"lowering": "reference"}, {"fits": 2, "disk": 8}
    with torch.no_grad():
        model = adapter_store.build_model(sizes)
        paths = adapter_store.save_adapters(model, tmp_path, sizes.adapters)
        cm = adapter_store.serve(model, paths, sizes, reference, 40_000)
        rows = adapter_store.examine(cm, sizes, counts, blocks=1)
        rows += adapter_store.misses(cm, attempts=10)
    found = {row["case"]: row for row in rows if row.get("arm") != "A/A"}
    assert found["fits"]["goal"] == adapter_store.GOAL
    assert found["fits"]["evictions"] == found["fits"]["reads"] == 0
    assert found["disk"]["evictions"] >= found["disk"]["reads"] > 0
    assert found["read"]["count"] > 0
    assert found["slot"]["p99_ms"] >= found["slot"]["p50_ms"] > 0
    assert "kept" in capsys.readouterr().out
