"""The command `lorafx` on the adapters and the model that the repository ships."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from lorafx.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("adapter", sorted(p.name for p in (EXAMPLES / "demo_adapters").iterdir()))
def test_inspect_lists_modules_with_rank_and_scale(adapter: str) -> None:
    result = run("inspect", str(EXAMPLES / "demo_adapters" / adapter))
    assert result.returncode == 0, result.stderr
    assert "rank" in result.stdout
    assert "model.layers.0." in result.stdout


def test_explain_names_sites_and_banks_without_running_the_model() -> None:
    result = run("explain", str(EXAMPLES / "demo_model"), "--target", "q_proj", "--max-rank", "4")
    assert result.returncode == 0, result.stderr
    assert "model.layers.0.self_attn.q_proj: Linear as Linear, 128 -> 128" in result.stdout
    assert "slots of rank up to 4" in result.stdout


def test_an_absent_adapter_is_one_line_and_a_failure(tmp_path: Path) -> None:
    result = run("inspect", str(tmp_path / "nothing"))
    assert result.returncode != 0
    assert "nothing does not exist" in result.stderr
    assert "Traceback" not in result.stderr
