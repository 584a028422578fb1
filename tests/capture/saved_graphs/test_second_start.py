"""A second start loads the graphs of the first, which serve all that they served there.

A second start is a model that is built again, with Dynamo reset.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from dense_merge import TOLERANCE, Case, check_mixed, error, save_adapter, valid
from expert_models import MIXED, ids, moe_base
from quantised import KINDS, Rounded, adapters, small_base
from quantised_experts import quantised
from step_logits import StepLogits, answers, check_logits
from tiny_models import plain_inputs, token_inputs
from torch import nn
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import lorafx

pytestmark = pytest.mark.any_sizes

MIX = ("a0", None, "a1")
LOADED, SAVED = "loaded from the folder", "saved for other processes"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "graphs"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


def start(
    model: nn.Module, case: Case, cache: Path, lowering: str = "reference", dynamic: bool = True
) -> Any:
    """`model`, compiled in a process that begins now as far as Dynamo knows."""
    torch._dynamo.reset()
    options = {"lowering": lowering, "cache": str(cache), "base_graphs": True}
    return lorafx.compile(model, case.folders, options=options, dynamic=dynamic)


def state(cm: Any) -> list[str]:
    """What became of each graph."""
    return [record.saved for record in cm._session.backend.records]


def test_loaded_graphs_serve_mixes_sizes_and_new_adapters(llama: Case, cache: Path) -> None:
    first = start(llama.model(), llama, cache)
    check_mixed(first, llama, MIX, token_inputs(3, 5))
    assert state(first) == [SAVED]

    cm = start(llama.model(), llama, cache)
    check_mixed(cm, llama, MIX, token_inputs(3, 5))
    assert state(cm) == [LOADED]
    check_mixed(cm, llama, ["a2", "a4", None, "a3", "a1"], token_inputs(5, 9))
    check_mixed(cm, llama, [None, "a2"], token_inputs(2, 3))
    cm.unload_adapter("a1")
    cm.load_adapter(llama.folders["a4"], "a1")
    inputs = token_inputs(3, 4)
    got = cm(**inputs, adapter_names=["a1", None, "a0"]).logits
    want = llama.expected(["a4", None, "a0"], inputs)
    assert error(valid(inputs, got), valid(inputs, want)) <= TOLERANCE
    assert state(cm) == [LOADED]  # and nothing was compiled for any of it
    assert cm.explain().sections  # whose lines name the sites of loaded graphs
    base, want = cm(**inputs, adapter_names=[None] * 3).logits, llama.base(**inputs).logits
    assert torch.equal(valid(inputs, base), valid(inputs, want))


@pytest.mark.slow
def test_inductors_code_with_generated_kernels(plain: Case, cache: Path) -> None:
    torch.manual_seed(0)
    inputs = plain_inputs(3, 5)
    for found in (SAVED, LOADED):
        cm = start(plain.model(), plain, cache, "inductor")
        check_mixed(cm, plain, MIX, inputs)
        base = cm(**inputs)["logits"]
        assert error(base, plain.expected([None] * 3, inputs)) <= TOLERANCE
        assert state(cm) == [found] * 2  # and the base's own
    check_mixed(cm, plain, ["a2", "a4", None, "a3", "a1"], plain_inputs(5, 9))
    assert state(cm) == [LOADED] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-int4-groups", "torchao-int4-packed"])
def test_a_base_of_integers(kind: str, tmp_path: Path, cache: Path) -> None:
    base = small_base()
    folders = adapters(base, tmp_path)
    names, inputs = ["a", None, "b"], token_inputs(3, 5)
    models = [copy.deepcopy(base) for _ in range(3)]
    for model in models:
        KINDS[kind][0](model)
    want = Rounded(base, models[0], folders).dense().expected(names, inputs)
    options = {"lowering": "inductor", "cache": str(cache)}
    for model, found in zip(models[1:], (SAVED, LOADED), strict=True):
        torch._dynamo.reset()
        cm = lorafx.compile(model, folders, options=options)
        got = cm(**inputs, adapter_names=names).logits
        assert error(valid(inputs, got), valid(inputs, want)) <= TOLERANCE
        assert state(cm) == [found]


@pytest.mark.slow
def test_quantised_experts(tmp_path: Path, cache: Path) -> None:
    """Those that are tensors which wrap others, as other weights are."""
    for found in (SAVED, LOADED):
        model, case = quantised(moe_base("qwen3_moe"), "int8", tmp_path)
        model.set_experts_implementation("lorafx")
        cm = start(model, case, cache, dynamic=False)
        check_mixed(cm, case, MIXED, ids())
        assert state(cm) == [found]


@pytest.mark.usefixtures("earlier_objects_frozen")
@pytest.mark.slow
def test_graphs_of_continuous_batching(llama: Case, cache: Path) -> None:
    sizes = ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=32)
    for found in (SAVED, LOADED):
        cm = start(llama.model(), llama, cache)
        with cm.continuous_batching(None, sizes) as engine:
            seen = StepLogits(engine)
            names = ["a0", None, "a3", "a1"]
            ids = [engine.add_request([3, 4, 5], adapter=name, max_new_tokens=3) for name in names]
            outputs = answers(engine, ids)
        check_logits(llama, seen, outputs, dict(zip(ids, names, strict=True)))
        assert state(cm) == [found] * 2


def test_a_reset_of_dynamo_loads_again(plain: Case, cache: Path) -> None:
    cm = start(plain.model(), plain, cache)
    inputs = plain_inputs(3, 5)
    want = cm(**inputs, adapter_names=MIX)["logits"]
    for _ in range(2):
        torch._dynamo.reset()
        assert torch.equal(cm(**inputs, adapter_names=MIX)["logits"], want)
    assert state(cm) == [SAVED, LOADED, LOADED]


SCRIPT = """
import json, sys
import torch
from torch import nn
import lorafx

weights, adapters, cache, result = sys.argv[1:]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up = nn.Embedding(61, 12), nn.Linear(12, 20)
        self.down, self.head = nn.Linear(20, 12, bias=False), nn.Linear(12, 61)

    def forward(self, ids):
        x = self.embed(ids)
        return {"logits": self.head(x + self.down(torch.relu(self.up(x))))}


model = Model().eval()
model.load_state_dict(torch.load(weights))
cm = lorafx.compile(
    model, json.loads(adapters), options={"lowering": "reference", "cache": cache}, dynamic=False
)
ids = torch.arange(15).reshape(3, 5)
logits = cm(ids=ids, adapter_names=["a0", None, "a1"])["logits"]
torch.save(logits, result)
print([record.saved for record in cm._session.backend.records])
"""


@pytest.mark.slow
def test_another_process_loads_the_graph(tmp_path: Path) -> None:
    """In which sets have another order, and objects other addresses."""
    script, weights, home = tmp_path / "model.py", tmp_path / "weights.pt", tmp_path / "graphs"
    script.write_text(SCRIPT)
    base = nn.ModuleDict(
        {
            "embed": nn.Embedding(61, 12),
            "up": nn.Linear(12, 20),
            "down": nn.Linear(20, 12, bias=False),
            "head": nn.Linear(12, 61),
        }
    )
    torch.save(base.state_dict(), weights)
    folders = {
        f"a{rank}": str(
            save_adapter(base, tmp_path / f"a{rank}", rank=rank + 2, targets="all-linear")
        )
        for rank in range(2)
    }
    said, logits = [], []
    for number in range(2):
        result = tmp_path / f"{number}.pt"
        done = subprocess.run(
            [sys.executable, script, weights, json.dumps(folders), home, result],
            env={**os.environ, "PYTHONHASHSEED": str(number)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout.strip())
        logits.append(torch.load(result))
    assert said == [str([SAVED]), str([LOADED])]
    assert torch.equal(*logits)
