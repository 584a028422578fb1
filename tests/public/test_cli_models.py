"""Commands of `lorafx` that write or run something: merge, bench. PEFT is the oracle."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import save_adapter
from dialect_files import as_kohya
from diffusers import UNet2DConditionModel
from peft import PeftModel
from served import Files, write_files
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafx.integrations.cli import main

pytestmark = pytest.mark.quick

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL, ADAPTERS = EXAMPLES / "demo_model", EXAMPLES / "demo_adapters"
IDS = torch.arange(40, 52).view(2, 6)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object, code: int = 0) -> Any:
        monkeypatch.setattr("sys.argv", ["lorafx", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code
        return json.loads(capsys.readouterr().out)

    return call


def logits(folder: Path | None, model: Path = MODEL) -> Tensor:
    made = AutoModelForCausalLM.from_pretrained(model).eval()
    if folder is not None:
        made = PeftModel.from_pretrained(made, folder)
    with torch.no_grad():
        return made(input_ids=IDS).logits


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_a_merged_model_is_what_peft_merges(run, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    said = run("merge", MODEL, ADAPTERS / "reverse", out)
    assert said == {"folder": str(out), "tokenizer": True}
    assert largest(logits(None, out), logits(ADAPTERS / "reverse")) <= 1e-4
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(MODEL))
    assert "is not empty" in run("merge", MODEL, ADAPTERS / "reverse", out, code=1)["message"]
    said = run("merge", tmp_path / "absent", ADAPTERS / "reverse", tmp_path / "x", code=1)
    assert said["error"] == "ConfigError"
    assert "cannot be loaded" in said["message"]


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model of diffusers, an adapter of PEFT's, and the same as kohya's tools write it."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "block_out_channels": (8,)}
    model = UNet2DConditionModel(
        **blocks,
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=6,
        attention_head_dim=4,
    )
    home = tmp_path_factory.mktemp("unet")
    model.save_pretrained(home / "unet")
    adapter = save_adapter(model, home / "peft", rank=2, targets=["to_q", "to_k"], seed=0)
    return home / "unet", adapter, as_kohya(adapter, home / "style.safetensors")


def of_unet(folder: Path, adapter: Path | None = None) -> Tensor:
    model = UNet2DConditionModel.from_pretrained(folder).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return model(sample, 3, torch.randn(1, 2, 6, generator=generator)).sample


def test_models_of_diffusers(run, unet: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, peft, kohya = unet
    wanted = of_unet(model, peft)
    assert largest(of_unet(model), wanted) > 1e-3
    [fit] = run("explain", model, "--adapter", kohya)["adapters"]
    assert fit["fits"]
    assert fit["modules"] == len(run("inspect", kohya, "--model", model)["modules"])
    assert not run("merge", model, kohya, tmp_path / "merged")["tokenizer"]
    assert largest(of_unet(tmp_path / "merged"), wanted) <= 1e-5
    assert "language models" in run("bench", model, "--adapters", peft, code=1)["message"]


class Terminal(io.StringIO):
    """What is shown on one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.slow
def test_bench_measures_all_arms_in_one_run(run, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    tiny = ("--batch", 3, "--length", 4, "--blocks", 2, "--seconds", 0.001)
    adapters = ("--adapters", ADAPTERS / "upper", "--adapters", ADAPTERS / "copy")
    said = run("bench", MODEL, *adapters, *tiny, "--lowering", "reference")
    [case] = said["cases"]
    assert [arm["arm"] for arm in case["arms"]] == [
        "base",
        "lorafx, no adapter",
        "lorafx, upper alone",
        "lorafx, 2 adapters",
        "PEFT, 2 adapters",
    ]
    served = [arm["served"] for arm in case["arms"]]
    assert served == ["eager", "compiled", "compiled", "compiled", "eager"]
    assert all(0 < arm["low"] <= arm["ratio"] <= arm["high"] for arm in case["arms"])
    assert case["difference"] <= 1e-5
    assert said["adapters"] == "upper, copy"
    for phase in (
        f"loading {MODEL}",
        "adding 2 adapters",
        "adding 2 adapters by PEFT",
        "3 requests of 4 tokens: first calls, which compile, 1 of 5: base",
        "3 requests of 4 tokens: first calls, which compile, 4 of 5: lorafx, 2 adapters",
        "3 requests of 4 tokens: measuring 2 blocks, for at least 0 s",
    ):
        assert re.search(f"lorafx: {re.escape(phase)}: [0-9.]+ s", terminal.getvalue()), phase
    said = run("bench", MODEL, *adapters, "--batch", 0, code=1)
    assert "must be positive" in said["message"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A Llama of one layer, for what captures many graphs."""
    return write_files(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
def test_bisect_finds_no_difference_in_a_right_model(run, tiny: Files) -> None:
    adapters = ("--adapters", tiny.adapters / "a0", "--adapters", tiny.adapters / "a2")
    asked = ("bisect", tiny.model, *adapters, "--length", 4, "--lowering", "reference")
    said = run(*asked)
    assert said["first"] is None
    assert said["served"] <= 1e-5
    assert all(stage["error"] <= 1e-5 for stage in said["stages"])
    # So strict that rounding is a difference: what then happens to a wrong model.
    said = run(*asked, "--tolerance", 1e-12, code=1)
    assert said["first"] is not None


def test_profile_has_a_row_for_each_site(run, tiny: Files) -> None:
    folders = tiny.adapters / "a0", tiny.adapters / "a2"
    adapters = ("--adapters", folders[0], "--adapters", folders[1])
    asked = ("profile", tiny.model, *adapters, "--length", 4, "--calls", 1)
    said = run(*asked, "--batch", 3, "--lowering", "reference")
    assert (said["rows"], said["adapters"], said["calls"]) == (3, 2, 1)
    assert said["way"] == "compiled"
    fits = ("--adapter", folders[0], "--adapter", folders[1])
    explained = run("explain", tiny.model, *fits)["report"]["sites"]
    sites = {row["path"] for row in explained}
    assert {path for node in said["nodes"] for path in node["paths"]} == sites
    assert "must be positive" in run(*asked, "--batch", 0, code=1)["message"]
