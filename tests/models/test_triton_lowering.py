"""Whole models under `lowering="triton"`, on the CPU in Triton's interpreter, against the oracle.

Inductor compiles the graph around the same generated kernels that a GPU runs, or it runs node by
node where only these kernels differ.
"""

from __future__ import annotations

import re
from typing import Any

import oracle
import pytest
import torch
from dense_merge import TOLERANCE, Case, check_mixed, error
from functorch.compile import make_boxed_func
from slowly import few
from tiny_models import FAMILIES
from torch._inductor.utils import run_and_get_code

from lorafx.errors import ConfigError
from lorafx.torch_internals import inductor

pytestmark = pytest.mark.any_sizes

NAMES = ["a1", None, "a3", "a0", "a2"]
TRITON = {"lowering": "triton"}


def inputs_of(family: str, rows: int = 5, length: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return FAMILIES[family].inputs(rows, length)


def strategies(cm: Any) -> set[str]:
    return {
        state.strategy.split(" ")[0]
        for record in cm._session.backend.records
        for state in record.states
    }


@pytest.mark.parametrize("strategy", few(["split", "epilogue", "gemv", "segments"], "gemv"))
def test_each_strategy_gives_the_merged_models_logits(
    plain: Case, strategy: str, request: pytest.FixtureRequest
) -> None:
    if strategy != "split":
        request.getfixturevalue("node_by_node")
    linears = ["up", "gate", "down", "head"]
    cm = plain.compile(options={**TRITON, "plan": dict.fromkeys(linears, strategy)})
    check_mixed(cm, plain, NAMES, inputs_of("plain"))
    assert strategies(cm) == {strategy, "embedding"}
    graphs = cm.recompiles
    check_mixed(cm, plain, [None, None, "a2", "a2", "a2"], inputs_of("plain"))
    check_mixed(cm, plain, ["a0", "a3", None], inputs_of("plain", 3, 7))
    assert cm.recompiles == graphs


#: Sizes of models whose linears all have a K that is a multiple of 16.
WHOLE = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    "gpt2": {"n_embd": 32, "n_inner": 48},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_models_by_the_strategy_of_prefill(case_of: Any, family: str) -> None:
    """Any mix and number of requests by one graph; packs, grouped queries, (in, out) and biases."""
    case = case_of(family, **WHOLE[family])
    plan = dict.fromkeys(oracle.linears(case.base), "concat")
    cm = case.compile(options={**TRITON, "plan": plan})
    inputs = inputs_of(family)
    output, codes = run_and_get_code(lambda: cm(**inputs, adapter_names=NAMES)["logits"])
    assert error(output, case.expected(NAMES, inputs)) <= TOLERANCE
    assert strategies(cm) - {"embedding"} == {"concat"}
    written_in_place("\n".join(codes))
    graphs = cm.recompiles
    for names in ([None, None, "a2", "a2", "a2"], ["a3"] * 5):
        check_mixed(cm, case, names, inputs_of(family))
    check_mixed(cm, case, ["a0", "a3", None], inputs_of(family, 3, 7))
    assert cm.recompiles == graphs
    check_mixed(cm, case, ["a1"], inputs_of(family, 1, 6))  # one request is a graph of its own


def written_in_place(code: str) -> None:
    """x' of each node is one buffer that what computes x wrote into, and nothing copies it."""
    calls = re.findall(r"triton_concat_\.default\((\w+), (\w+),", code)
    assert calls
    for buffers in calls:
        for buffer in buffers:
            assert re.search(rf"{buffer} = (empty_strided_cpu\(|.*# reuse)", code)
            parts = re.findall(rf"(\w+) = reinterpret_tensor\({buffer}, .*# alias", code)
            assert parts
            assert all(re.search(rf"cpp_fused\w+\(.*\b{part}\b", code) for part in parts)
            assert re.search(rf"extern_kernels\.(add)?mm\(.*\b{buffer}\b", code)


@pytest.mark.slow
@pytest.mark.usefixtures("node_by_node")
def test_base_rows_keep_their_bits_whatever_their_neighbours_use(plain: Case) -> None:
    """In one graph, whose products of the base are the same calls for every mix."""
    plan = dict.fromkeys(["up", "gate", "down", "head"], "gemv")
    cm = plain.compile(options={**TRITON, "plan": plan}, dynamic=False)
    inputs = inputs_of("plain")
    some = cm(**inputs, adapter_names=NAMES)["logits"]
    captured = cm.recompiles
    others = cm(**inputs, adapter_names=["a4", None, "a0", "a3", "a1"])["logits"]
    assert cm.recompiles == captured
    assert torch.equal(some[1], others[1])
    assert not torch.equal(some[0], others[0])
    assert error(some[1:2], plain.expected([None] * 5, inputs)[1:2]) <= TOLERANCE


def test_a_strategy_that_the_lowering_lacks_is_refused(plain: Case) -> None:
    with pytest.raises(ConfigError, match="generated"):
        plain.compile(options={**TRITON, "plan": {"up": "generated"}})
    with pytest.raises(ConfigError, match="epilogue"):
        plain.compile(options={"lowering": "inductor", "plan": {"up": "epilogue"}})


def test_a_site_without_its_base_product_cannot_be_fused(plain: Case) -> None:
    options = {**TRITON, "passes": {"fuse": False}, "plan": {"up": "epilogue"}}
    cm = plain.compile(options=options, dynamic=False)
    with pytest.raises(Exception, match="base product is not part of the node"):
        cm(**inputs_of("plain"), adapter_names=NAMES)


def test_a_captured_launch_reads_weights_and_banks_in_place_and_slots_from_a_copy(
    plain: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Inductor hands to CUDA graphs: a bank that were copied would cost its size a step, and a
    slots buffer taken for fixed would freeze the mix."""
    seen: list[tuple[list[Any], set[int]]] = []

    def spy(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        seen.append((list(inputs), set(kwargs["static_input_idxs"])))
        return make_boxed_func(gm)  # what is made of them costs a C++ kernel each

    monkeypatch.setattr(inductor, "compile_fx_inner", spy)
    cm = plain.compile(options={"lowering": "inductor"}, dynamic=False)
    cm(**inputs_of("plain"), adapter_names=NAMES)
    ((values, fixed),) = seen
    tensors = {i: value for i, value in enumerate(values) if isinstance(value, torch.Tensor)}
    slots = {i for i, value in tensors.items() if value.dtype == torch.int32 and value.dim() == 1}
    ids = {i for i, value in tensors.items() if value.dtype == torch.int64}
    assert len(slots) == len(ids) == 1
    assert fixed == set(tensors) - slots - ids
