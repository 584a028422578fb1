"""Routed experts by `model.set_experts_implementation("lorafx")`: dense and quantised ones, in
graphs and in eager mode; against W + ΔW of the dequantised weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error
from expert_models import MIXED, experts_modules, ids, moe_base, moe_case
from quantised_experts import QUANTISED, check_calls, quantised
from slowly import few
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import lorafx
from lorafx.errors import ConfigError, MatchError, TargetError


def by_lorafx(kind: str, model_type: str, folder: Path) -> tuple[nn.Module, Case]:
    if kind == "dense":
        case = moe_case(model_type, folder)
        model = case.model()
    else:
        model, case = quantised(moe_base(model_type), kind, folder)
    model.set_experts_implementation("lorafx")
    return model, case


#: Stacked and interleaved halves, (E, N, K) and (E, K, N), with biases.
CASES = [
    ("int8", "qwen3_moe"),
    ("nf4", "gpt_oss"),
    ("int4", "mixtral"),
    ("fp8", "gpt_oss"),
    ("dense", "gpt_oss"),
]


@pytest.mark.parametrize(("kind", "model_type"), few(CASES, "int8"))
def test_in_graphs(kind: str, model_type: str, tmp_path: Path) -> None:
    """And in eager mode, by the fixture of both roads. The library's weights stay what they are."""
    model, case = by_lorafx(kind, model_type, tmp_path)
    before = {name: (type(value), value.shape) for name, value in model.named_parameters()}
    cm = lorafx.compile(model, case.folders, options=REFERENCE, dynamic=False)
    check_mixed(cm, case, MIXED, ids())
    check_mixed(cm, case, ["params"], ids(1, 1))  # most experts get no rows
    graphs = cm.recompiles
    for seed, names in enumerate((["older", "params", None, "down", None], ["older"] * 5)):
        check_mixed(cm, case, names, ids(seed=seed))
    cm.load_adapter(case.folders["older"], "again")
    more = Case(case.base, case.folders, {**case.merged, "again": case.merged["older"]})
    check_mixed(cm, more, ["again", None, "down", "params", "dense"], ids())
    assert cm.recompiles == graphs
    assert "refused" not in str(cm.explain())
    after = {name: (type(value), value.shape) for name, value in model.named_parameters()}
    assert after == before


@pytest.mark.slow
@pytest.mark.any_sizes
def test_generation_and_other_sizes_in_graphs(tmp_path: Path) -> None:
    model, case = by_lorafx("int4", "mixtral", tmp_path)
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    check_calls(cm, case)
    graphs = cm.recompiles
    check_mixed(cm, case, ["older", "params", None, "down"], ids(4, 9))
    assert cm.recompiles == graphs


@pytest.mark.usefixtures("in_eager_mode")
@pytest.mark.parametrize(
    ("kind", "model_type"), [("dense", "qwen3_moe"), ("int8", "mixtral"), ("nf4", "gpt_oss")]
)
def test_in_eager_mode(kind: str, model_type: str, tmp_path: Path) -> None:
    model, case = by_lorafx(kind, model_type, tmp_path)
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    check_calls(cm, case)
    assert cm.recompiles == 0
    if kind != "dense":
        with pytest.raises(MatchError, match="cannot be merged, and nothing has changed"):
            cm.merge("down")


@pytest.mark.parametrize("kind", few(["int8", "nf4"], "int8"))
def test_experts_without_adapters(kind: str, tmp_path: Path) -> None:
    """They are no sites, and what holds them belongs to nobody."""
    model, case = by_lorafx(kind, "mixtral", tmp_path)
    cm = lorafx.compile(model, {"dense": case.folders["dense"]}, options=REFERENCE)
    assert not any("experts" in str(site) for site in cm.sites)
    check_mixed(cm, case, ["dense", None, "dense"], ids(3))


class Largest(TorchDispatchMode):
    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.found = max(self.found, result.numel())
        return result


@pytest.mark.parametrize("kind", few(["dense", "int8", "nf4"], "int8"))
def test_the_base_alone(kind: str, tmp_path: Path) -> None:
    """Without lorafx.compile: eagerly, and in one graph of torch.compile for all sizes. No operator
    makes the dequantised weights of all experts."""
    model, case = by_lorafx(kind, "mixtral", tmp_path)
    ((_, experts),) = experts_modules(case.base)
    with torch.no_grad(), Largest() as largest:
        got = model(**ids()).logits
    assert error(got, case.base(**ids()).logits) <= TOLERANCE
    assert kind == "dense" or largest.found < experts.gate_up_proj.numel()  # a view of W
    graphs = list[Any]()

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows, length in ((5, 4), (6, 8), (7, 9)):  # no part has such sizes
            batch = ids(rows, length)
            assert error(compiled(**batch).logits, case.base(**batch).logits) <= TOLERANCE
    assert len(graphs) == 1
    assert str(graphs[0].graph).count("stored_grouped_mm") == (0 if kind == "dense" else 2)


def test_rows_of_other_ranks_experts_add_nothing(tmp_path: Path) -> None:
    """Indices of E and more have weights of zero (transformers' expert parallelism)."""
    for kind, model_type in (("int8", "qwen3_moe"), ("nf4", "gpt_oss")):
        model, case = by_lorafx(kind, model_type, tmp_path / kind)
        ((path, _),) = experts_modules(case.base)
        experts = model.get_submodule(path)
        count, hidden = experts.num_experts, model.config.hidden_size
        x, chosen = torch.randn(3, hidden), torch.tensor([[0, 1], [count, 2], [count, count]])
        weights = torch.where(chosen < count, 0.5, 0.0)
        experts._is_expert_parallel = True
        with torch.no_grad():
            y, alone = experts(x, chosen, weights), experts(x[:2], chosen[:2] % count, weights[:2])
            none = experts(x[:0], chosen[:0], weights[:0])
        assert error(y[:2], alone) <= TOLERANCE
        assert not y[2].any()
        assert none.shape == (0, hidden)


@pytest.mark.parametrize("top_k", few([1, 3], 3))
def test_numbers_of_experts_of_a_token(top_k: int, tmp_path: Path) -> None:
    base = moe_base("qwen3_moe")
    base.config.num_experts_per_tok = top_k
    for module in base.modules():
        if hasattr(module, "top_k"):
            module.top_k = top_k
    model, case = quantised(base, "int8", tmp_path)
    model.set_experts_implementation("lorafx")
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    check_mixed(cm, case, MIXED, ids())


@pytest.mark.slow
def test_the_backend_of_torch_compile(tmp_path: Path) -> None:
    model, case = by_lorafx("int8", "qwen3_moe", tmp_path)
    lorafx.attach(model, {"down": case.folders["down"]}, options=REFERENCE)
    compiled = torch.compile(model, backend="lorafx")
    with torch.no_grad(), lorafx.adapters(model, ["down", None, "down"]):
        got = compiled(**ids(3)).logits
    for row, name in enumerate(("down", None, "down")):
        want = case.alone(name)(input_ids=ids(3)["input_ids"][row : row + 1]).logits
        assert error(got[row : row + 1], want) <= TOLERANCE


def test_what_cannot_be_read_by_expert_is_refused(tmp_path: Path) -> None:
    """By name, at compilation if an adapter is for it, else in the call; nothing has changed."""
    model, case = by_lorafx("int8", "qwen3_moe", tmp_path)
    ((_, experts),) = experts_modules(model)
    experts.gate_up_proj.act_quant_kwargs = object()  # activations that the kernel would round
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(TargetError, match=r"gate_up_proj.*Int8Tensor.*\('eager'\)"):
        lorafx.compile(model, case.folders, options=REFERENCE)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with pytest.raises(ConfigError, match=r"gate_up_proj.*Qwen3MoeExperts.*Int8Tensor"):
        model(**ids())


def test_other_weights_after_compilation(tmp_path: Path) -> None:
    """Numbers that are written in place are read; a weight that was replaced is refused."""
    model, case = by_lorafx("int8", "qwen3_moe", tmp_path)
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    check_mixed(cm, case, ["down", None], ids(2))
    ((_, experts),) = experts_modules(model)
    experts.down_proj.scale.mul_(2)
    ((_, dense),) = experts_modules(case.base)
    dense.down_proj.data.mul_(2)
    changed = Case(case.base, {"down": case.folders["down"]})
    check_mixed(cm, changed, ["down", None], ids(2))


@pytest.mark.parametrize(("kind", "chosen"), [("int8", "grouped_mm"), ("int4", "eager")])
def test_a_product_that_torchao_lacks_is_refused(kind: str, chosen: str, tmp_path: Path) -> None:
    """By name, before the call has changed a cache."""
    model, case = quantised(moe_base("qwen3_moe"), kind, tmp_path)
    model.set_experts_implementation(chosen)
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    cache = DynamicCache()
    for names in (["down", None], [None, None]):
        with pytest.raises(
            ConfigError, match=rf"layers\.0\.mlp\.experts\.gate_up_proj: In.*'{chosen}'.*'lorafx'"
        ):
            cm(**ids(2), adapter_names=names, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert cm.recompiles == 0


@pytest.mark.usefixtures("in_eager_mode")
@pytest.mark.parametrize("name", ["down", "dense"])
def test_slices_of_a_weight_without_adapters(name: str, tmp_path: Path) -> None:
    """Slices of torchao's class, which has no view for a look at the numbers."""
    model, case = quantised(moe_base("qwen3_moe"), "int8", tmp_path)
    model.set_experts_implementation("eager")
    cm = lorafx.compile(model, {name: case.folders[name]}, options=REFERENCE)
    check_mixed(cm, case, [name, None], ids(2))


@pytest.mark.parametrize("kind", few(["int8", "nf4"], "int8"))
def test_experts_that_are_quantised_after_compilation(kind: str, tmp_path: Path) -> None:
    """And after a call with the dense ones."""
    _, case = quantised(moe_base("qwen3_moe"), kind, tmp_path)
    model = moe_base("qwen3_moe")
    model.set_experts_implementation("lorafx")
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    dense = cm(**ids(3), adapter_names=["down", "older", None]).logits
    assert not [*cm._session.program.stored_experts]
    QUANTISED[kind](model)
    assert len([*cm._session.program.stored_experts]) == 2
    check_mixed(cm, case, ["down", "older", None], ids(3))
    assert error(cm(**ids(3), adapter_names=["down", "older", None]).logits, dense) > TOLERANCE


def test_copies_of_a_model(tmp_path: Path) -> None:
    """Copied and pickled as without lorafx, before it is compiled and while it is."""
    model, case = by_lorafx("int8", "qwen3_moe", tmp_path)
    ((_, experts),) = experts_modules(model)
    with pytest.raises(AttributeError, match="partial"):
        pickle.dumps(experts.extra_repr)  # torchao's own, which no pickle holds
    del experts.extra_repr
    with torch.no_grad():
        want = model(**ids(2)).logits
        for compiled in (False, True):
            if compiled:
                lorafx.compile(model, {"down": case.folders["down"]}, options=REFERENCE)
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(twin(**ids(2)).logits, want)


@pytest.mark.slow
def test_the_switch_is_heard_after_a_call_that_raised(tmp_path: Path) -> None:
    """torchao has no product for transformers' default. To and fro compiles nothing, as `generate`
    does on GPUs."""
    model, case = by_lorafx("int8", "qwen3_moe", tmp_path)
    model.set_experts_implementation("grouped_mm")
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    graphs = 0
    for seed in (1, 2):
        model.set_experts_implementation("grouped_mm")
        with pytest.raises(ConfigError, match=r"experts\.gate_up_proj: Int8Tensor has no product"):
            cm(**ids(2), adapter_names=["down", None])
        model.set_experts_implementation("lorafx")
        check_mixed(cm, case, ["down", None], ids(2, seed=seed))
        graphs = graphs or cm.recompiles
    assert cm.recompiles == graphs
