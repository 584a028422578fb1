"""The command `lorafx` on the adapters and the model that the repository ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafx.cli import main

pytestmark = pytest.mark.quick

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["lorafx", *arguments])
        main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("adapter", sorted(p.name for p in (EXAMPLES / "demo_adapters").iterdir()))
def test_inspect_lists_modules_with_rank_and_scale(adapter: str, run) -> None:
    output = run("inspect", str(EXAMPLES / "demo_adapters" / adapter))
    assert "rank" in output
    assert "model.layers.0." in output


def test_explain_names_sites_and_banks_without_running_the_model(run) -> None:
    output = run("explain", str(EXAMPLES / "demo_model"), "--target", "q_proj", "--max-rank", "4")
    assert "model.layers.0.self_attn.q_proj: Linear as Linear, 128 -> 128" in output
    assert "slots of rank up to 4" in output


def test_an_absent_adapter_is_one_line_and_a_failure(run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing does not exist"):
        run("inspect", str(tmp_path / "nothing"))
