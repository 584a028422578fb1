"""Routed experts as slices W[e] of 3-D weights, one after another: transformers' "eager".

    y[t] = Σ_e w[t, e] · down[e] (silu(gate[e] x[t]) · up[e] x[t])        e among the chosen of t

There the weights may be quantised by torchao or bitsandbytes, whose products the base keeps. Which
rows an expert gets is known by their values only, so eager mode serves such batches. Slices whose
numbers are constant are in graphs, too.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from dense_merge import REFERENCE, Case, check_mixed, error
from expert_models import ids, moe_base, moe_case
from quantised_experts import check_calls, quantised
from slowly import few
from tiny import randomise
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lorafx
from lorafx.errors import LorafxError, MatchError


def in_a_loop(model_type: str) -> nn.Module:
    base = moe_base(model_type)
    base.set_experts_implementation("eager")
    return base


@pytest.mark.usefixtures("in_eager_mode")
@pytest.mark.parametrize("model_type", few(["qwen3_moe", "mixtral", "gpt_oss"], "gpt_oss"))
def test_dense_slices(model_type: str, tmp_path: Path) -> None:
    case = moe_case(model_type, tmp_path, in_a_loop(model_type))
    cm = case.compile()
    check_calls(cm, case)
    assert cm.recompiles == 0


@pytest.mark.usefixtures("in_eager_mode")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("kind", few(["int8", "fp8", "nf4"], "int8", "nf4"))
def test_quantised_slices(kind: str, model_type: str, tmp_path: Path) -> None:
    """Against W + ΔW of the dequantised weights. The library's weights stay what they were."""
    model, case = quantised(in_a_loop(model_type), kind, tmp_path)
    before = {name: type(value) for name, value in model.named_parameters()}
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    check_calls(cm, case)
    assert cm.recompiles == 0
    assert {name: type(value) for name, value in model.named_parameters()} == before
    attention = ["dense", None]  # the loop's own products stand between the rows of others
    check_mixed(cm, case, attention, ids(2))
    with pytest.raises(MatchError, match="cannot be merged, and nothing has changed"):
        cm.merge("down")


@pytest.mark.usefixtures("in_eager_mode")
def test_grouped_products_with_four_bits_are_refused(tmp_path: Path) -> None:
    """The graph of a parametrisation that caches returns the whole weight."""
    model, case = quantised(moe_base("qwen3_moe"), "nf4", tmp_path)
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    with pytest.raises(
        MatchError, match=r"quantised format.*set_experts_implementation\('lorafx'\)"
    ):
        cm(**ids(2), adapter_names=["down", None])
    model.set_experts_implementation("eager")
    check_mixed(cm, case, ["down", None], ids(2))


class AllExperts(nn.Module):
    """Every token goes through every expert, by slices with constant numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(3, 20, 16))
        self.down_proj = nn.Parameter(torch.empty(3, 16, 10))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(3):
            gate, up = (x @ self.gate_up_proj[e].T).chunk(2, dim=-1)
            y = y + weights[:, e, None] * F.linear(F.silu(gate) * up, self.down_proj[e - 3])
        return y


class Model(nn.Module):
    def __init__(self, experts: type[nn.Module] = AllExperts) -> None:
        super().__init__()
        self.embed, self.gate = nn.Embedding(50, 16), nn.Linear(16, 3)
        self.experts, self.head = experts(), nn.Linear(16, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        x = hidden.reshape(-1, 16)
        y = self.experts(x, torch.softmax(self.gate(x), dim=-1))
        return self.head(hidden + y.view(hidden.shape))


def small_case(experts: type[nn.Module], folder: Path) -> Case:
    torch.manual_seed(0)
    base = Model(experts).eval().requires_grad_(False)
    randomise(base)
    names = {"both": ["gate_up_proj", "down_proj"], "down": ["down_proj"]}
    return Case(
        base,
        {
            name: oracle.save_adapter(
                base, folder / name, rank=2, targets=["gate"], seed=1, target_parameters=parameters
            )
            for name, parameters in names.items()
        },
    )


def test_constant_numbers_are_in_the_graph(tmp_path: Path) -> None:
    case = small_case(AllExperts, tmp_path)
    cm = case.compile()
    for names in (["both", None, "down"], ["down", "both", "both"]):
        check_mixed(cm, case, names, {"input_ids": torch.randint(0, 50, (3, 4))})
    assert cm.recompiles == 1


class WithoutASwitch(nn.Module):
    """A loop of transformers that `set_experts_implementation` does not change."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"num_local_experts": 3, "hidden_size": 16, "moe_intermediate_size": 10}
        of_step = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
        self.loop = of_step.Step3p7Experts(SimpleNamespace(**sizes, hidden_act="silu"))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        chosen = torch.topk(weights, 2, dim=-1)
        return self.loop(x, chosen.indices, chosen.values)


@pytest.mark.usefixtures("in_eager_mode")
def test_a_loop_without_a_switch(tmp_path: Path) -> None:
    case = small_case(WithoutASwitch, tmp_path)
    cm = case.compile()
    for names in (["both", None, "down"], ["down", "both"], ["both"]):
        check_mixed(cm, case, names, {"input_ids": torch.randint(0, 50, (len(names), 4))})
    assert cm.recompiles == 0


class Doubled(AllExperts):
    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return F.linear(x, (2 * self.gate_up_proj)[0])[:, :16] + super().forward(x, weights)


class Summed(AllExperts):
    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return x + self.gate_up_proj[0].sum() + super().forward(x, weights)


@pytest.mark.parametrize("experts", [Doubled, Summed])
def test_another_use_of_the_weights_is_refused(
    experts: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both roads, but for adapters that leave that weight alone."""
    case, inputs = small_case(experts, tmp_path), {"input_ids": torch.randint(0, 50, (2, 4))}
    for start in ("compiled", "eager"):
        monkeypatch.setenv("LORAFX_START", start)
        cm = case.compile()
        with pytest.raises(MatchError, match=r"experts\.gate_up_proj"):
            cm(**inputs, adapter_names=["both", None])
        check_mixed(cm, case, ["down", None], inputs)


class Divided(AllExperts):
    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, weights) / self.gate_up_proj[0].abs().amax().item()


class Moved(AllExperts):
    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        w = self.gate_up_proj[0]
        w.data = 2 * w.data
        return F.linear(x, w)[:, :16] + super().forward(x, weights)


class Joined(nn.Module):
    """What is computed of a row of nobody beside rows of one request is used for all."""

    def __init__(self) -> None:
        super().__init__()
        self.loop, self.gate = AllExperts(), nn.Linear(16, 3)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        beside = torch.cat([x.new_ones(1, 16), x[:4]])
        beside = self.loop(beside, torch.softmax(beside[:, :3], dim=-1))
        return self.loop(x + beside[:1], torch.softmax(self.gate(x), dim=-1))


class Lent(nn.Module):
    """A loop that runs with another weight than its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loop, self.other = AllExperts(), nn.Parameter(torch.empty(3, 20, 16))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return torch.func.functional_call(self.loop, {"gate_up_proj": self.other}, (x, weights))


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is F.linear else result


class UnderAMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loop = AllExperts()

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        with Doubling():
            return self.loop(x, weights)


@pytest.mark.usefixtures("in_eager_mode")
@pytest.mark.parametrize(
    "experts",
    [Divided, Moved, Joined, Lent, UnderAMode],
    ids=lambda cls: cls.__name__,
)
def test_answers_are_right_or_refused(experts: type[nn.Module], tmp_path: Path) -> None:
    """Where the products of a loop are not all that its weights, or its rows, are used for."""
    case, inputs = small_case(experts, tmp_path), {"input_ids": torch.randint(0, 50, (2, 4))}
    cm = case.compile()
    for names in (["both", None], ["both", "both"]):
        try:
            got = cm(**inputs, adapter_names=names)
        except LorafxError:
            continue
        assert error(got, case.expected(names, inputs)) <= 1e-5
