"""Changes of a weight that have a structure, wherever a model is served: eager mode and graphs,
transposed weights, bfloat16, the engine, torch.compile, exports."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from dense_merge import REFERENCE, TOLERANCE, Case, error
from method_files import MethodCase, merged, save
from step_logits import check_three_requests
from torch import nn
from torch.nn.utils import parametrizations

import lorafx
from lorafx.errors import CapacityError
from lorafx.op_arguments import bound

LLAMA: Mapping[str, peft.PeftConfig] = {
    "a0": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"]),
    "a1": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "a2": peft.LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "down_proj"]),
    "a3": peft.RoadConfig(group_size=4, target_modules=["v_proj"]),
    "a4": peft.LoKrConfig(r=8, alpha=3, target_modules=["v_proj"]),
}
GPT2: Mapping[str, peft.PeftConfig] = {
    "a0": peft.IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]
    ),
    "a1": peft.LoraConfig(r=3, lora_alpha=4, target_modules=["c_attn"]),
}
IDS = torch.randint(0, 60, (4, 6), generator=torch.Generator().manual_seed(1))
NAMES = ["a0", "a1", None, "a3"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> MethodCase:
    return MethodCase.of_configs("llama", LLAMA, tmp_path_factory.mktemp("structures"))


def check(case: Case, cm: Any, names: list[Any]) -> None:
    got = cm(IDS[: len(names)], adapter_names=names).logits
    assert error(got, case.expected(names, {"input_ids": IDS[: len(names)]})) <= TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"start": "eager"},
        {"start": "compiled"},
        {"start": "compiled", "verify": "numeric"},
        pytest.param({"start": "compiled", "lowering": "inductor"}, marks=pytest.mark.slow),
    ],
)
def test_in_both_tiers(llama: MethodCase, options: dict[str, str]) -> None:
    cm = llama.compile({"cache": None, **options})
    check(llama, cm, NAMES)
    graphs = cm.recompiles
    check(llama, cm, ["a4", "a3", "a0", None])
    check(llama, cm, ["a1", "a1", "a2", "a0"])
    assert cm.recompiles == graphs == (options["start"] == "compiled")


def test_turned_inputs_are_read_by_the_product_itself(llama: MethodCase, tmp_path: Path) -> None:
    options = {"start": "compiled", "cache": None, "dump": str(tmp_path)}
    cm = llama.compile(options)
    check(llama, cm, NAMES)
    stages = cm._session.backend.records[-1].stages
    (graph,) = (stage.graph.graph for stage in stages if stage.name == "replace_rows")
    products = graph.find_nodes(op="call_function", target=torch.ops.lorafx.own_linear.default)
    assert len(products) == 4
    assert all(bound(node)["turned"] for node in products)


@pytest.mark.parametrize("start", ["eager", "compiled"])
def test_transposed_weights(start: str, tmp_path: Path) -> None:
    case = MethodCase.of_configs("gpt2", GPT2, tmp_path)
    check(case, case.compile({"start": start, "cache": None}), ["a0", None, "a1", "a0"])


def test_a_slot_has_room_for_the_numbers_alone(llama: MethodCase) -> None:
    cm = llama.compile({"start": "eager", "cache": None})
    rooms = {site.path.rpartition(".")[2]: site.own_rows for site in cm._session.program.sites}
    assert rooms == {"q_proj": 4, "k_proj": 1, "v_proj": 2, "down_proj": 4}
    numbers = 4 * (12 + 40)  # outputs of k_proj, inputs of down_proj
    assert cm._session.store["a1"].numbers.nbytes == numbers


def test_in_bfloat16(llama: MethodCase) -> None:
    """By the mean square: the largest of few errors is one rounding more or less, as it happens."""
    model = llama.model().bfloat16()
    cm: Any = lorafx.compile(model, llama.folders, options={**REFERENCE, "start": "eager"})
    rounded = copy.deepcopy(model).double()
    for name in ("a0", "a1", "a3"):
        got = cm(IDS, adapter_names=[name] * 4).logits
        twin = merged(rounded, llama.folders[name])
        with torch.no_grad():
            true, dense = twin(IDS).logits, copy.deepcopy(twin).bfloat16()(IDS).logits
        errors = [(result - true).square().mean().sqrt().item() for result in (got, dense)]
        assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("start", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_in_the_engine(llama: MethodCase, start: str) -> None:
    check_three_requests(llama, llama.compile({"start": start, "cache": None}, dynamic=True))


def test_behind_torch_compile(llama: MethodCase) -> None:
    model = lorafx.attach(llama.model(), llama.folders, options=REFERENCE)
    call = torch.compile(model, backend="lorafx")
    with torch.no_grad(), lorafx.adapters(model, NAMES):
        got = call(IDS).logits
    assert error(got, llama.expected(NAMES, {"input_ids": IDS})) <= TOLERANCE


@pytest.mark.parametrize("name", ["a0", "a1", "a3", "a4"])
def test_exported(llama: MethodCase, name: str, tmp_path: Path) -> None:
    llama.compile({"start": "eager"}).export_merged(name, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert error(model(IDS).logits, llama.alone(name)(IDS).logits) <= TOLERANCE


def test_what_they_change_is_told(llama: MethodCase) -> None:
    cm = llama.compile({"start": "eager"})
    adapters = {adapter.name: adapter for adapter in cm.explain().adapters}
    assert "norm" not in str(adapters["a0"])
    assert "weights of its own at 2 of them" in str(adapters["a0"])
    assert "own" not in str(adapters["a2"])
    path = "model.layers.0.self_attn.q_proj"
    assert "norm of ΔW 0" not in (text := str(cm.why(path, adapter="a0")))
    assert "it has a weight of its own here" in text


def test_no_package_holds_one(llama: MethodCase, tmp_path: Path) -> None:
    inputs = {"input_ids": IDS, "use_cache": False}
    with pytest.raises(lorafx.UnsupportedAdapterError, match=r"without weights of adapters' own"):
        lorafx.export(llama.model(), None, inputs, tmp_path / "m.pt2", adapters=llama.folders)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "configs"), [("llama", LLAMA), pytest.param("gpt2", GPT2, marks=pytest.mark.slow)]
)
def test_a_hook_that_breaks_the_graph_behind_the_product(
    family: str, configs: Mapping[str, peft.PeftConfig], tmp_path: Path
) -> None:
    case = MethodCase.of_configs(family, configs, tmp_path)
    model = case.model()
    for path, module in model.named_modules():
        if path.endswith(("q_proj", "down_proj", "mlp.c_proj")):
            module.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    options = {**REFERENCE, "start": "compiled", "cache": None}
    cm: Any = lorafx.compile(model, adapters=case.folders, options=options)
    check(case, cm, ["a0", None, "a1", "a0"])


@pytest.mark.parametrize("start", ["eager", "compiled"])
def test_sums_have_what_is_added(start: str, tmp_path: Path) -> None:
    lokr, other, third = (
        peft.LoKrConfig(r=64, decompose_factor=4, target_modules=targets)
        for targets in (["q_proj", "down_proj"], ["q_proj"], ["down_proj"])
    )
    waves = peft.FourierFTConfig(n_frequency=30, target_modules=["q_proj", "v_proj"])
    configs = {"a0": lokr, "a1": other, "a2": LLAMA["a2"], "a3": LLAMA["a0"], "a4": waves}
    configs["a5"] = third
    case = MethodCase.of_configs("llama", configs, tmp_path)
    cm = case.compile({"start": start, "cache": None})
    check(case, cm, [{"a0": 0.5, "a2": -2.0}, None, {"a1": 3.0}, "a3"])
    check(case, cm, ["a0", {"a1": -0.5, "a2": 1.0}, {"a0": 1.5}, "a2"])
    check(case, cm, ["a4", {"a4": -0.5, "a2": 1.0}, {"a4": 3.0}, None])
    cm.merge("a2")
    cm.unmerge()  # which makes them again
    check(case, cm, ["a4", {"a4": -0.5, "a2": 1.0}, {"a4": 3.0}, None])
    several = {"a0": 0.5, "a1": -1.5, "a4": 2.0, "a2": 1.0}  # q_proj has room for a whole weight
    check(case, cm, [several, "a0", {"a1": 1.0, "a4": 1.0}, None])
    room = r"change model\.layers\.0\.mlp\.down_proj .*LoraConfig\(modules_to_save="
    with pytest.raises(CapacityError, match=room):
        cm(IDS, adapter_names=[{"a0": 0.5, "a5": 0.5}] * 4)
    with pytest.raises(lorafx.ConfigError, match="'a3' has weights of its own"):
        cm(IDS, adapter_names=[{"a3": 0.5}] * 4)


class Turned(nn.Module):
    """Its second linear gets the requests in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).flip(0)).flip(0)


def test_turned_inputs_of_requests_in_another_order(tmp_path: Path) -> None:
    base, x, names = Turned().eval(), torch.randn(3, 8), ["a4", "a2", "a4"]
    to = {"target_modules": ["first", "second"]}
    configs = {f"a{size}": peft.OFTConfig(oft_block_size=size, **to) for size in (2, 4)}
    case = MethodCase(base, {name: save(base, c, tmp_path / name) for name, c in configs.items()})
    cm = case.compile({"start": "compiled", "cache": None})
    want = [case.alone(name)(row) for name, row in zip(names, x.double().split(1), strict=True)]
    assert error(cm(x, adapter_names=names), torch.cat(want)) <= TOLERANCE


def test_a_weight_that_a_parametrisation_computes(tmp_path: Path) -> None:
    base, x = Turned().eval(), torch.randn(2, 8)
    config = peft.OFTConfig(oft_block_size=4, target_modules=["first"])
    case = MethodCase(base, {"oft": save(base, config, tmp_path / "oft")})
    model = case.model()
    parametrizations.weight_norm(model.first)
    cm: Any = lorafx.compile(model, case.folders, options=REFERENCE)
    assert error(cm(x, adapter_names=["oft"] * 2), case.alone("oft")(x.double())) <= TOLERANCE


@pytest.mark.parametrize("bias", [True, False])
def test_no_bias_is_merged(bias: bool, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 8, bias=bias)).eval()
    folder = save(base, peft.BeftConfig(target_modules=["0"]), tmp_path / "beft")
    why = "has a bias of its own" if bias else "adds a bias, and the base has no parameter"
    with pytest.raises(lorafx.MatchError, match=f"0: the adapter {why}"):
        lorafx.compile(base, {"beft": folder}, options=REFERENCE).merge("beft")


@pytest.mark.parametrize("name", ["self_attn", "act_fn"])
def test_room_where_no_weight_is(llama: MethodCase, name: str) -> None:
    config = lorafx.LoraConfig(target_modules=["q_proj"], trainable_tokens={name: 2})
    with pytest.raises(lorafx.TargetError, match=f"{name} .* cannot have a weight of an adapter's"):
        lorafx.compile(llama.model(), config)
