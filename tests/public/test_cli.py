"""The command `lorafx` on the adapters and the model that the repository ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


def test_inspect_says_the_dialect_the_size_and_the_features(run, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    factors = {"lora_down.weight": torch.ones(2, 3), "lora_up.weight": torch.ones(5, 2)}
    name = "lora_unet_down_blocks_0_proj_in"
    alpha = {f"{name}.alpha": torch.tensor(1.0)}
    save_file({**{f"{name}.{key}": t for key, t in factors.items()}, **alpha}, file)
    output = run("inspect", str(file))
    assert "dialect: kohya" in output
    assert "2 tensors, 64 bytes" in output
    assert "1 modules, rank 2" in output
    assert name in output
    adapter = str(EXAMPLES / "demo_adapters" / "upper")
    assert "dialect: peft" in run("inspect", adapter)
    checked = run("inspect", adapter, "--model", str(EXAMPLES / "demo_model"))
    assert "nothing is refused" in checked


def test_inspect_says_what_is_refused_and_why(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(EXAMPLES / "demo_adapters" / "upper", tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_qalora": True}))
    with pytest.raises(SystemExit, match="1"):
        run("inspect", str(tmp_path / "a"))
    output = capsys.readouterr().out
    assert "use_qalora = True: QALoRA pools the inputs" in output
    assert "tensors" in output
