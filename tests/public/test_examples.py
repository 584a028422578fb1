"""What examples/ shows is what it does. README.md is run by tests/docs."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from adapters_in_memory import source_of
from dense_merge import REFERENCE, error
from torch import nn

import lorafx

#: Nobody is to learn that from our own examples.
pytestmark = pytest.mark.filterwarnings("error:.* is in training mode:lorafx.LorafxWarning")

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = {
    "base": "8",
    "consonants": "cmplr",
    "copy": "compiler",
    "reverse": "relipmoc",
    "rot13": "pbzcvyre",
    "upper": "COMPILER",
}


@pytest.mark.slow  # the same road as the demo
def test_hf_mixed_batch(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_mixed_batch.py"])
    runpy.run_path(str(ROOT / "examples/hf_mixed_batch.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if ": compiler>" in line] == [
        f"{name}: compiler>{answer}" for name, answer in ANSWERS.items()
    ]


def test_plain_module(capsys):
    runpy.run_path(str(ROOT / "examples/plain_module.py"), run_name="__main__")
    assert capsys.readouterr().out.count("as when served alone") == 3


def test_own_pass(capsys):
    runpy.run_path(str(ROOT / "examples/own_pass.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(r"^  count_work +How many multiplications a row takes", said, re.MULTILINE)
    assert "2 sites: 1536 multiplications a row, LoRA adds up to 512" in said
    assert said.count("as when served alone") == 3


@pytest.mark.slow  # what they do is tested in tests/layers, but for Inductor
@pytest.mark.parametrize("name", ["parallel_llama", "parallel_qwen3_5"])
def test_parallel_layers(name, capsys):
    runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "logits equal those of" in said
    assert said.count("as when served alone") == 3


def test_lorafx_in_300_lines(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = ROOT / "examples/lorafx_in_300_lines.py"
    assert path.read_text().count("\n") <= 300
    example = runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.count("as when served alone") == 4
    model, ids, names = (example[name] for name in ("model", "ids", "names"))
    sources = {
        name: source_of(model, {path: (A, s * B) for path, (A, B, s) in adapter.items()})
        for name, adapter in example["adapters"].items()
        if name is not None
    }
    cm = lorafx.compile(model, adapters=sources, options=REFERENCE)
    want = cm(ids, adapter_names=names)
    assert error(example["served"](ids, names), want) <= 1e-5


class MeanOfAll(nn.Module):
    """Each row is centred by the mean of all requests."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x):
        return self.up(x - x.mean(0))


class OwnProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.up.weight


@pytest.mark.parametrize(
    ("cls", "why"), [(MeanOfAll, "whose elements aten.mean"), (OwnProduct, "a delta of up changes")]
)
def test_lorafx_in_300_lines_refuses_what_it_cannot_prove(monkeypatch, cls, why):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    example = runpy.run_path(str(ROOT / "examples/lorafx_in_300_lines.py"))
    with pytest.raises(example["Refused"], match=why):
        example["Served"](cls().eval(), torch.randn(3, 4), ["up"])
    model, none = nn.Sequential(nn.Linear(4, 4)).eval(), torch.zeros(1, 1)
    served = example["Served"](model, torch.randn(3, 4), ["0"])
    with pytest.raises(example["Refused"], match="no targets"):
        served.load("mine", {"down": (none, none, 1.0)})


@pytest.mark.slow  # the roads are tested one by one
def test_torch_compile(capsys):
    runpy.run_path(str(ROOT / "examples/torch_compile.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    for road in ("marked", "by_options", "peft_model"):
        for name in ("base", "reverse", "upper"):
            assert f"{road}, {name}: compiler>{ANSWERS[name]}" in lines


@pytest.mark.slow  # what it does is tested in tests/integrations/diffusers
def test_diffusion_pipeline(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusion_pipeline.py"])
    runpy.run_path(str(ROOT / "examples/diffusion_pipeline.py"), run_name="__main__")
    assert capsys.readouterr().out.count("as when made alone by diffusers") == 3


@pytest.mark.slow  # what they do is tested in tests/models/test_expert_models.py
def test_experts(capsys):
    runpy.run_path(str(ROOT / "examples/experts.py"), run_name="__main__")
    assert capsys.readouterr().out.count("as when served alone") == 3


@pytest.mark.slow  # what they do is tested in tests/weights
def test_live_update(capsys):
    runpy.run_path(str(ROOT / "examples/live_update.py"), run_name="__main__")
    said = capsys.readouterr().out
    for line in (" tensors updated", "as the trained model gives", "unmerged: bit-equal"):
        assert line in said
    for name in ("merged", "exported"):
        assert float(re.search(rf"^{name}: off by (\S+)$", said, re.MULTILINE)[1]) < 1e-4


@pytest.mark.slow
def test_training_script_writes_what_the_demo_reads(monkeypatch, tmp_path):
    model, adapters = tmp_path / "model", tmp_path / "adapters"
    few = ["--steps", "2", "--adapter-steps", "1", "--batch", "4"]
    where = ["--model", str(model), "--adapters", str(adapters)]
    monkeypatch.setattr(sys, "argv", ["train_demo.py", *few, *where])
    runpy.run_path(str(ROOT / "examples/train_demo.py"), run_name="__main__")
    for made, shipped in (
        (model, ROOT / "examples/demo_model"),
        (adapters, ROOT / "examples/demo_adapters"),
    ):
        files = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
        assert files == {path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()}
