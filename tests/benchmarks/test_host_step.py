"""What benchmarks/host_step.py measures: every arm's graphs are still, and every step is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("bench")


@pytest.mark.slow
def test_graphs_are_still_and_none_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import host_step

    with torch.no_grad():
        arms: dict[str, Any] = host_step.decodings(1, host_step.Stillness(), tmp_path)
        results = {}
        for name, arm in arms.items():
            assert arm.cache.get_seq_length() == 10  # seven tokens, three steps
            with arm.around():
                results[name] = arm.step()
                assert arm.step() is results[name]  # nothing was computed
            assert arm.cache.get_seq_length() == 10
    base, mixed = results["base"], results["lorafx mixed"]
    assert torch.equal(results["lorafx base"], base)
    assert not torch.allclose(mixed[0], base[0])
    assert torch.allclose(mixed[1], base[1], atol=1e-5)
    assert torch.allclose(results["backend mixed"], mixed, atol=1e-5)

    monkeypatch.setattr(host_step, "decodings", lambda *_: dict(arms))
    rows = host_step.run_case(1, blocks=1, seconds=0.001)
    assert [row["arm"] for row in rows] == ["A/A", *list(arms)[1:]]
    assert rows[0]["goal"] is None
    assert all(row["goal"] == host_step.GOAL for row in rows[1:])
    assert "backend mixed" in capsys.readouterr().out
