"""The command `lorafx` on the adapters and the model that the repository ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafx
from lorafx.integrations.cli import main

pytestmark = pytest.mark.quick

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["lorafx", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code
        return capsys.readouterr().out

    return call


def test_explain_names_sites_and_banks_without_running_the_model(run) -> None:
    model = EXAMPLES / "demo_model"
    output = run("explain", model, "--target", "q_proj", "--max-rank", "4")
    lines = [line.strip() for line in output.splitlines()]
    assert "model.layers.{0-1}.self_attn.q_proj: Linear, 128 -> 128, float32" in lines
    assert "slots of rank up to 4" in output
    assert "model.layers.{0-1}.self_attn.k_proj: not selected: " in output
    report = json.loads(run("explain", model, "--dtype", "bfloat16", "--json"))["report"]
    assert {site["dtype"] for site in report["sites"]} == {"bfloat16"}
    sizes = sum(site["in_features"] + site["out_features"] for site in report["sites"])
    assert report["adapter_bytes"] == 2 * 16 * sizes
    said = json.loads(run("explain", model, "--dtype", "nothing", "--json", code=1))
    assert "no dtype of this name" in said["message"]


def test_explain_tells_the_memory_of_slots_that_are_smaller_than_the_largest_rank(run) -> None:
    asked = ("explain", EXAMPLES / "demo_model", "--target", "q_proj", "--max-rank", "16", "--json")

    def banks(*options: str) -> int:
        return sum(bank["nbytes"] for bank in json.loads(run(*asked, *options))["report"]["banks"])

    assert banks("--slot-rank", "4") < banks() / 2  # 7 · 4 + 16 rows in the place of 8 · 16
    title = "8 slots of rank up to 16, room for rank 4 in each"
    assert title in run(*asked[:-1], "--slot-rank", "4")
    assert "in each" not in run(*asked[:-1])
    refused = json.loads(run(*asked, "--slot-rank", "32", code=1))
    assert "--slot-rank = 32 is over max_rank = 16" in refused["message"]


def test_an_absent_adapter_is_one_line_and_a_failure(run, monkeypatch, tmp_path: Path) -> None:
    absent = str(tmp_path / "nothing")
    monkeypatch.setattr("sys.argv", ["lorafx", "inspect", absent])
    with pytest.raises(SystemExit, match="nothing does not exist") as ended:
        main()
    assert isinstance(ended.value.code, str)  # which Python prints, and exits with 1
    monkeypatch.chdir(tmp_path)
    said = json.loads(run("inspect", "nope", "--json", code=1))
    assert said["error"] == "CheckpointError"
    assert said["message"] == (
        "adapter folder nope does not exist; name a folder or a file, or an adapter on the hub "
        '("owner/name")'
    )


@pytest.mark.parametrize("name", ["nope", "owner/nope", "a/b/nope", "./nope"])
def test_an_absent_model_is_a_line(run, name: str) -> None:
    for command in (["explain", name], ["merge", name, "a", "out"]):
        said = json.loads(run(*command, "--json", code=1))
        assert said["error"] == "ConfigError"
        assert said["message"].startswith(f"{name} cannot be loaded: ")
        is_path = name not in ("nope", "owner/nope")  # which may be names on the hub
        assert ("there is no such folder" in said["message"]) == is_path


def test_help_the_version_and_wrong_usage(run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version").split() == ["lorafx", lorafx.__version__]
    alone = run()
    assert alone.split() == run("--help").split()
    commands = "inspect explain merge bench bisect profile serve doctor"
    for command in commands.split():
        assert command in alone
        assert "Example: lorafx" in run(command, "--help")
    for wrong in (["nothing"], ["inspect"], ["bench", "m", "--batch", "many"]):
        run(*wrong, code=2)
    assert "install-completion" in alone


def test_explain_answers_whether_adapters_fit(run, tmp_path: Path) -> None:
    adapters, model = EXAMPLES / "demo_adapters", EXAMPLES / "demo_model"
    said = run("explain", model, "--adapter", adapters)
    assert "reverse fits: rank 16, 14 modules" in said
    assert "slots of rank up to 16" in said
    shutil.copytree(adapters / "upper", tmp_path / "wide")
    file = tmp_path / "wide" / "adapter_model.safetensors"
    wide = {key: torch.cat((t, t), -1) for key, t in load_file(file).items()}
    save_file({key: t.contiguous() for key, t in wide.items()}, file)
    both = ("--adapter", tmp_path / "wide", "--adapter", adapters / "upper")
    said = run("explain", model, *both, code=1)
    assert "wide does not fit: " in said
    assert "upper fits: rank 8, 6 modules" in said
    found = json.loads(run("explain", model, *both, "--json", code=1))
    assert [fit["fits"] for fit in found["adapters"]] == [False, True]
    assert "128" in found["adapters"][0]["problem"]
    narrow = load_file(adapters / "upper" / "adapter_model.safetensors")
    key = next(key for key in narrow if "lora_A" in key)
    size = len(narrow[key.replace("lora_A", "lora_B")]), narrow[key].shape[1]
    at = key.removeprefix("base_model.model.").partition(".lora_A")[0]
    whole = {f"{at}.lokr_w1": torch.ones(1, 1), f"{at}.lokr_w2": torch.ones(size)}
    save_file(whole, tmp_path / "whole.safetensors")
    said = run("explain", model, "--adapter", tmp_path / "whole.safetensors")
    assert "fits: rank 0, 1 modules" in said
    assert len(found["report"]["sites"]) == 6
    said = run("explain", model, "--adapter", adapters / "reverse", "--max-rank", "4", code=1)
    assert "give --max-rank 16" in said
    said = run("explain", model, "--adapter", adapters / "reverse", "--target", "q_proj", code=1)
    assert "add it to --target" in said
    said = json.loads(run("explain", model, "--max-adapters", "0", "--json", code=1))
    assert said["message"] == "--max-adapters must be a positive integer, got 0"


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
    assert "scale" in output
    assert "unet.down_blocks_0_proj_in" in output
    adapter = str(EXAMPLES / "demo_adapters" / "upper")
    assert "dialect: peft" in run("inspect", adapter)
    checked = run("inspect", adapter, "--model", str(EXAMPLES / "demo_model"))
    assert "nothing is refused" in checked


def test_inspect_says_what_is_refused_and_why(run, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "demo_adapters" / "upper", tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "arrow_config": {"top_k": 2}}))
    found = json.loads(run("inspect", tmp_path / "a", "--json", code=1))
    assert found["error"] == "UnsupportedAdapterError"
    assert "arrow_config = {'top_k': 2}: Arrow routes tokens" in found["message"]
    other = {f"layers.{i}.q.oft_diag": torch.ones(3, 2) for i in range(4)}
    save_file(other, tmp_path / "oft.safetensors")
    found = json.loads(run("inspect", tmp_path / "oft.safetensors", "--json", code=1))
    assert "OFT" in found["message"]
    assert "4 keys, such as 'layers.0.q.oft_diag'" in found["message"]
