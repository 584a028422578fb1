"""What the passes over a model say of what they found and did."""

from __future__ import annotations

import copy

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

import lorafx

pytestmark = pytest.mark.quick


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.up, self.gate = nn.Linear(4, 6), nn.Linear(4, 6).double()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.again = self.layers[1]
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.empty = nn.Linear(4, 0)


def notes(cm: lorafx.CompiledModel) -> dict[str, tuple[str, ...]]:
    return {report.name: report.notes for report in cm._session.program.prepared}


def test_each_pass_says_what_it_did(tmp_path):
    model = Model().eval()
    config = LoraConfig(r=2, target_modules=["q", "k"], init_lora_weights=False)
    get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "a")
    wanted = lorafx.LoraConfig(["q", "k", "gate", "up"], max_adapters=3, max_rank=2)
    cm = lorafx.compile(model, wanted, adapters={"a": tmp_path / "a"})
    found = notes(cm)
    assert "layers.1 is also again: one module, with one delta" in found["alias"]
    assert "embed.weight, head.weight are one weight" in found["alias"]
    assert "layers.{0-1}.q: Linear, 4 -> 4" in found["select"]
    (embed,) = [line for line in found["select"] if line.startswith("embed: ")]
    assert embed == (
        "embed: not selected: target_modules=['q', 'k', 'gate', 'up'] does not name it"
    )
    (read,) = found["read"]
    assert read.startswith(f"a from {tmp_path / 'a'}")
    assert read.endswith(": rank 2; modules or parts with factors: 4")
    assert found["attach"][0].startswith(
        "layers.{0-1}: one bank for q + k + up, 3 slots of rank up to 2, "
    )
    assert found["load"] == ("a: 0.000256 MB of host memory, no slot yet",)
    assert found["pack_weights"] == (
        "layers.{0-1}: the weights of q + k + up are views of one buffer",
    )
    assert all(
        report.end > report.end - report.seconds > 0 for report in cm._session.program.prepared
    )
