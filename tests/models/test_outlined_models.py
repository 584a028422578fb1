"""Repeated layers of models, outlined: the same results, one body a kind of layer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, Case, build_case, check_mixed, error
from tiny_models import FAMILIES, token_inputs

from lorafx.capture.record import GraphRecord

OFF = {"passes": {"outline": False}}
NAMES = ["a0", None, "a1", "a2"]
LAYERS = 2


def record(cm: Any, index: int = 0) -> GraphRecord:
    return cm._session.backend.records[index]


def repeats(cm: Any, index: int = 0) -> list[tuple[str, ...]]:
    return [told.paths for told in record(cm, index).outlined]


def outlined_nodes(cm: Any) -> int:
    return next(report.nodes for report in record(cm).passes if report.name == "outline")


@pytest.fixture(scope="module")
def deep(llama) -> Case:
    return llama


@pytest.fixture(scope="module")
def served(deep) -> tuple[Any, Any]:
    """With the pass and without it, for all tests that ask nothing of a new model."""
    return deep.compile(), deep.compile(OFF)


def test_layers_are_one_and_the_results_are_the_same(deep, served):
    torch.manual_seed(0)
    inputs = token_inputs(4, 6)
    cm, off = served
    check_mixed(cm, deep, NAMES, inputs)
    assert repeats(cm) == [tuple(f"model.layers.{index}" for index in range(LAYERS))]
    got, want = (each(**inputs, adapter_names=NAMES).logits for each in (cm, off))
    assert torch.equal(got, want)
    assert record(off).outlined == []
    line = "outline: model.layers.0 and 1 more like it as one"
    assert line in str(cm.explain())
    assert "like it as one" not in str(off.explain())


@pytest.mark.slow
def test_graphs_do_not_grow_with_depth(tmp_path):
    sizes = []
    for layers in (2, 3):
        case = build_case("llama", tmp_path / str(layers), num_hidden_layers=layers)
        cm = case.compile()
        cm(**token_inputs(3, 5), adapter_names=["a0", None, "a0"])
        sizes.append(outlined_nodes(cm))
    # A call, its three results and the inputs of one more layer, which has seventy-five nodes.
    assert sizes[1] - sizes[0] < 40


def test_mixes_and_swaps_capture_nothing_new(deep, served):
    torch.manual_seed(0)
    cm, _ = served
    check_mixed(cm, deep, NAMES, token_inputs(4, 6))
    captured = cm.recompiles
    for names, length in ((["a3", "a3"], 5), ([None, "a4", "a1"], 8), (NAMES, 3)):
        check_mixed(cm, deep, names, token_inputs(len(names), length))
    cm.unload_adapter("a2")
    cm.load_adapter(deep.folders["a3"], "a2")
    inputs = token_inputs(2, 4)
    got = cm(**inputs, adapter_names=["a2", None]).logits
    assert torch.allclose(got, deep.expected(["a3", None], inputs), atol=1e-5)
    assert cm.recompiles == captured
    cm.unload_adapter("a2")
    cm.load_adapter(deep.folders["a2"], "a2")


@pytest.mark.parametrize(
    "cache",
    [{}, {"cache_implementation": "static"}],
    ids=["grows", "static"],
)
@pytest.mark.slow
def test_generate_with_caches(served, cache):
    """A layer's cache is an operand and a result; lengths are one symbol each, and agree."""
    torch.manual_seed(0)
    inputs = {**token_inputs(3, 5), "max_new_tokens": 3, "do_sample": False, **cache}
    cm, off = served
    before = cm.recompiles, off.recompiles
    got, want = (each.generate(**inputs, adapter_names=NAMES[:3]) for each in (cm, off))
    assert torch.equal(got, want)
    assert cm.recompiles - before[0] == off.recompiles - before[1]
    for index in range(cm.recompiles):
        assert [len(paths) for paths in repeats(cm, index)] == [LAYERS]


def test_two_kinds_of_layer_are_two_bodies(tmp_path):
    """Gemma's layers alternate between a window and the whole sequence."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    case = build_case("gemma3", tmp_path, num_hidden_layers=5, layer_types=kinds)
    cm = case.compile(dynamic=False)
    check_mixed(cm, case, NAMES, FAMILIES["gemma3"].inputs(4, 7))
    assert repeats(cm) == [
        ("model.layers.0", "model.layers.2", "model.layers.4"),
        ("model.layers.1", "model.layers.3"),
    ]


@pytest.mark.slow
def test_numeric_verification_and_dumps(deep, tmp_path):
    cm = deep.compile({"verify": "numeric", "dump": str(tmp_path)}, dynamic=False)
    torch.manual_seed(0)
    check_mixed(cm, deep, NAMES, token_inputs(4, 6))
    text = next(tmp_path.glob("*/*-outline.py")).read_text()
    assert text.count("torch.ops.higher_order.invoke_subgraph(outlined_0") == LAYERS
    # The body stands below the graph that calls it.
    assert text.count("class outlined_0") == 1
    body = text.partition("class outlined_0")[2]
    assert body.count("lorafx.fused_linear") == 4


@pytest.mark.slow
def test_inductor_compiles_the_body_once(deep):
    torch.manual_seed(0)
    inputs = token_inputs(4, 6)
    inductor = {"lowering": "inductor"}
    cm, off = deep.compile(inductor), deep.compile({**inductor, **OFF}, dynamic=False)
    check_mixed(cm, deep, NAMES, inputs)
    assert len(repeats(cm)[0]) == LAYERS
    got, want = (each(**inputs, adapter_names=NAMES).logits for each in (cm, off))
    assert error(got, want) <= TOLERANCE
    captured = cm.recompiles
    check_mixed(cm, deep, NAMES[1:], token_inputs(3, 9))
    assert cm.recompiles == captured


AGAIN = """
import sys, torch
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from dense_merge import build_case, check_mixed
from tiny_models import token_inputs
from torch._dynamo.utils import counters

torch.manual_seed(0)
case = build_case("llama", Path(sys.argv[1]), num_hidden_layers=3)
cm = case.compile({"lowering": "inductor"})
check_mixed(cm, case, ["a0", None, "a1"], token_inputs(3, 5))
print("hits", counters["inductor"]["fxgraph_cache_hit"], cm.recompiles)
"""


@pytest.mark.slow
def test_another_process_takes_the_graph_from_the_cache(tmp_path):
    tests = Path(__file__).parents[1]
    paths = [str(tests / "helpers"), str(tests / "conformance")]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", AGAIN, str(tmp_path / "adapters"), *paths]
    said = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert [text.strip().splitlines()[-1] for text in said] == ["hits 0 1", "hits 1 1"]
