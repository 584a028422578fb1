"""Tensors made of weights, of which load_weights has to know: none keeps old numbers unsaid. Views
and compiled graphs see new ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from absorbed import AbsorbedAttention, OneLayer, absorbed, case_of, post_process, states
from dense_merge import REFERENCE, Case, check_mixed, save_adapter
from expert_models import moe_base
from namings import new_weights, plain
from slowly import few
from tiny_models import FAMILIES
from torch import Tensor, nn

import lorafx
from lorafx.errors import BaseWeightsError, MatchError
from lorafx.model.module_graph import Holder
from lorafx.weights.copies import outdated_copies

WIDTH = 32


def compiled(model: nn.Module, targets: tuple[str, ...] = ("o",)) -> Any:
    return lorafx.compile(model, lorafx.LoraConfig(target_modules=list(targets)), options=REFERENCE)


class Fused(nn.Module):
    """Multiplies by q and k at once, by a matrix that was made of both."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.how = how
        self.fuse()

    def fuse(self) -> None:
        q, k = self.q.weight.detach(), self.k.weight.detach()
        if self.how == "rows":
            self.fused = torch.cat([q, k])
        elif self.how == "padded":
            self.fused = 2 * torch.cat([q, k, torch.zeros(8, WIDTH)])
        else:
            self.fused = torch.cat([q @ k, q + k])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q, k = F.linear(x, self.fused)[..., : 2 * WIDTH].chunk(2, -1)
        y = torch.tanh(q) * torch.sigmoid(k)
        return {"logits": self.o(y)}


def seeded(build: Any, *arguments: Any) -> Any:
    torch.manual_seed(1)
    return build(*arguments).eval().requires_grad_(False)


@pytest.mark.parametrize("how", ["rows", "padded", "products"])
def test_made_of_several_weights(how: str, tmp_path: Path) -> None:
    """Refused by name. A call shows that `o` is used as it is."""
    model = seeded(Fused, how)
    cm = compiled(model, ("q", "k", "o"))
    x = torch.randn(2, 3, WIDTH)
    cm.load_adapter(save_adapter(model, tmp_path, rank=2, targets=["o"]), "a")
    cm(x, adapter_names=["a", None])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh = new_weights(model, 3)
    state = plain(fresh)
    with pytest.raises(
        BaseWeightsError, match=r"q.weight, k.weight: fused .*would keep the old ones"
    ):
        cm.load_weights(state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    cm.load_weights({"o.weight": state["o.weight"]}, strict=False)


ORDINARY: dict[str, Callable[[], nn.Module]] = {
    **{name: FAMILIES[name].build for name in ("gpt2",)},
    "deepseek_v3": lambda: moe_base("deepseek_v3"),
}


@pytest.mark.parametrize("family", ORDINARY)
def test_ordinary_models_hold_no_copies(family: str) -> None:
    """Masks, rotary tables and positions are none, also before there are weights."""
    model = ORDINARY[family]().eval().requires_grad_(False)
    fresh = plain(new_weights(model, 3))
    cm = lorafx.compile(model, lorafx.LoraConfig(), options=REFERENCE)
    program = cm._session.program
    holders = [Holder(site.path, site.module, site.eligible.weight) for site in program.sites]
    assert outdated_copies(program, holders) == []
    cm.load_weights(fresh)
    assert all(torch.equal(t, fresh[name]) for name, t in model.state_dict().items())


NAMES = ["a", None, "b", "c"]
IDS = {"input_ids": torch.randint(3, 61, (3, 5), generator=torch.Generator().manual_seed(1))}
ROWS = ["a0", None, "a2"]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One attention of DeepSeek-V3 as transformers computes it."""
    return case_of(OneLayer, tmp_path_factory.mktemp("layer"))


def served_layer(layer: Case, kept: str) -> Any:
    model = absorbed(layer)
    cm = lorafx.compile(model, layer.folders, options=REFERENCE)
    post_process(model, kept)
    check_mixed(cm, layer, NAMES, states(4, 4))
    return cm


def check_new(cm: Any, layer: Case, seed: int = 3) -> None:
    """New weights by the names of the model that is not absorbed."""
    fresh = new_weights(layer.base, seed)
    graphs = cm.recompiles
    kept = [
        value.data_ptr()
        for module in cm._orig_mod.modules()
        if isinstance(module, AbsorbedAttention)
        for value in (module.w_uk, module.w_uv)
    ]
    cm.load_weights(plain(fresh))
    check_mixed(cm, Case(fresh, layer.folders), NAMES, states(4, 4))
    assert cm.recompiles == graphs
    assert kept == [
        value.data_ptr()
        for module in cm._orig_mod.modules()
        if isinstance(module, AbsorbedAttention)
        for value in (module.w_uk, module.w_uv)
    ]


def test_absorbed_views(layer: Case) -> None:
    cm = served_layer(layer, "views")
    check_new(cm, layer)
    check_new(cm, layer, 4)


@pytest.mark.parametrize(
    "kept", few(["copies", "permuted copies", "parameters"], "permuted copies")
)
def test_absorbed_copies_are_refused(layer: Case, kept: str) -> None:
    """By updates and merges of their weight alone."""
    cm = served_layer(layer, kept)
    fresh = plain(new_weights(layer.base, 3))
    refused = r"kv_b_proj.weight: self_attn.w_u[kv] repeats its numbers"
    with pytest.raises(BaseWeightsError, match=refused):
        cm.load_weights(fresh, strict=False)
    with pytest.raises(MatchError, match=refused):
        cm.merge("a")
    check_mixed(cm, layer, NAMES, states(4, 4))
    cm.merge("c")
    cm.unmerge()
    name = "self_attn.o_proj.weight"
    cm.load_weights({name: fresh[name]}, strict=False)
    assert torch.equal(cm._orig_mod.self_attn.o_proj.weight, fresh[name])


@pytest.mark.slow
def test_what_inductor_compiled(llama: Case) -> None:
    """Weights are inputs of its graphs, none is folded into one or laid out anew, also where the
    process is set to freeze them."""
    with torch._inductor.config.patch(freezing=True):
        cm = llama.compile({"lowering": "inductor"})
        for names in (ROWS, [None] * 3):
            cm(**IDS, adapter_names=names)
        graphs = cm.recompiles
        fresh = new_weights(llama.base, 6)
        cm.load_weights(iter(plain(fresh).items()))
        case = Case(fresh, llama.folders)
        check_mixed(cm, case, ROWS, IDS)
        check_mixed(cm, case, [None] * 3, IDS)
        assert cm.recompiles == graphs
