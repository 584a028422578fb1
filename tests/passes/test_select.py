"""select: target forms on real modules, and every refusal with its message."""

from __future__ import annotations

import pytest
import torch
from marking import attach_sites, llama
from torch import nn

from lorafx.config import LoraConfig
from lorafx.errors import CaptureError, LorafxWarning, TargetError
from lorafx.passes.alias import Alias
from lorafx.program.program import Preparation
from lorafx.runtime.marking import build_sites

pytestmark = pytest.mark.quick


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.k_proj = nn.Linear(8, 4)
        self.act = nn.ReLU()


class Model(nn.Module):
    def __init__(self, **odd: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.head = nn.Linear(8, 16, bias=False)
        for name, module in odd.items():
            self.add_module(name, module)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def paths(model: nn.Module, target=None, exclude=None) -> list[str]:
    config = LoraConfig(target_modules=target, exclude_modules=exclude)
    return [site.path for site in build_sites(model, config)[1]]


LINEARS = [f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "k_proj")]


@pytest.mark.parametrize("target", [None, "all-linear", "All-Linear"])
def test_all_linear_leaves_out_the_output_embedding(target):
    assert paths(Model(), target) == LINEARS


def test_forms():
    model = Model()
    assert paths(model, ["k_proj", "q_proj"]) == LINEARS  # the model's order, not the list's
    assert paths(model, ["1.q_proj"]) == ["layers.1.q_proj"]
    assert paths(model, ["layers.0.q_proj", "head", "embed"]) == [
        "embed",
        "layers.0.q_proj",
        "head",
    ]
    assert paths(model, r"layers\.\d\.q_proj") == ["layers.0.q_proj", "layers.1.q_proj"]
    assert paths(model, {"head"}) == ["head"]


def test_exclusions():
    model = Model()
    assert paths(model, None, ["k_proj"]) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert paths(model, None, r"layers\.0\..*") == LINEARS[2:]
    assert paths(model, ["embed", "q_proj"], "all-linear") == ["embed"]


def test_peft_selects_the_same():
    peft = pytest.importorskip("peft")
    for target, exclude in [
        ("all-linear", None),
        (["q_proj", "embed_tokens", "lm_head"], None),
        (r".*\.(up|down)_proj", ["layers.0.mlp.up_proj"]),
    ]:
        model = llama()
        mine = set(paths(model, target, exclude))
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=target, exclude_modules=exclude)
        )
        assert mine == set(wrapped.targeted_module_names)


# Refusals ---------------------------------------------------------------------------------


class Grouped(nn.Linear):
    """A Linear by class whose weight is not (out, in)."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(4, 8))


def sparse_linear() -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False)
    return module


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


LEAVE = r"leave it out of target_modules, or name it in exclude_modules"
#: What cannot carry LoRA, and what is said after its path and class.
IMPOSSIBLE = [
    (nn.ConvTranspose1d(4, 4, 3), f"transposed convolutions carry no LoRA, .*; {LEAVE}$"),
    (nn.Conv2d(4, 4, 3, dilation=2), rf"it has dilation \(2, 2\), and A, .*; {LEAVE}$"),
    (Standardised(4, 4, 3), f"its class overrides forward, so PEFT's A and B, .*; {LEAVE}$"),
    (nn.LayerNorm(4), f"it scales its input .* no matrix.*; {LEAVE}$"),
    (nn.GRU(4, 4), f"recurrent layers carry no LoRA; {LEAVE}$"),
    (nn.ReLU(), f"it has no weight; {LEAVE}$"),
    (
        nn.Sequential(nn.Linear(4, 4)),
        rf"it has no weight of its own; name modules inside .*{LEAVE}; .* below it: odd\.0$",
    ),
    (nn.LazyLinear(4), "its parameters are not initialised.*run the model"),
    (nn.Embedding(4, 4, max_norm=1.0), f"it has max_norm, .*, or {LEAVE}$"),
    (Grouped(), rf"its weight has shape \(4, 8\), .*ask for \(8, 8\).*, or {LEAVE}$"),
    (sparse_linear(), rf"its weight is a sparse tensor \(torch.sparse_coo\).*, or {LEAVE}$"),
]


@pytest.mark.parametrize(("module", "message"), IMPOSSIBLE, ids=lambda v: type(v).__name__)
def test_named_and_impossible(module, message):
    label = rf"^odd \({type(module).__name__}\): "
    with pytest.raises(TargetError, match=label + message):
        paths(Model(odd=module), ["odd", "q_proj"])


def test_matched_by_default_and_impossible_is_a_warning():
    with pytest.warns(LorafxWarning, match="odd .* carries no LoRA: its "):
        assert paths(Model(odd=Grouped())) == LINEARS


def test_every_problem_at_once():
    with pytest.raises(TargetError) as caught:
        paths(Model(odd=nn.LazyLinear(4)), ["odd", "act", "q_porj", "head", "nothing.like.it"])
    message = str(caught.value)
    assert message.startswith("5 problems with target_modules:")
    for part in (
        "layers.0.act (ReLU)",
        "layers.1.act (ReLU)",
        "odd (LazyLinear)",
        "'q_porj' names no module of Model; nearest: q_proj",
        "'nothing.like.it' names no module of Model",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("target", "near"),
    [
        ("q_prj", "; nearest: q_proj"),
        (["%%%"], "; modules that can carry LoRA: .*q_proj"),
        ([], ""),
    ],
    ids=str,
)
def test_targets_that_name_nothing(target, near):
    with pytest.raises(TargetError, match=f"names no module of Model{near}"):
        paths(Model(), target)


def test_everything_excluded():
    with pytest.raises(
        TargetError, match=r"exclude_modules=\['q_proj'\] excludes every module .*\(2\)"
    ):
        paths(Model(), ["q_proj"], ["q_proj"])


def test_an_exclusion_that_names_nothing_is_a_warning():
    with pytest.warns(LorafxWarning, match="exclude_modules entry 'kproj' names no module; near"):
        assert paths(Model(), None, ["kproj"]) == LINEARS


# alias


def shared_model() -> nn.Module:
    model = nn.Module()
    model.a = nn.Linear(4, 4)
    model.items = nn.ModuleList([model.a, nn.Linear(4, 4)])
    model.by_name = nn.ModuleDict({"x": model.items[1]})
    return model


def test_one_site_and_one_mark_for_an_instance_with_several_paths():
    model = shared_model()
    config = LoraConfig(target_modules=["a", "x", "items.0"])
    _, sites = build_sites(model, config)
    assert [site.paths for site in sites] == [("a", "items.0"), ("items.1", "by_name.x")]
    attachment = attach_sites(model, sites, config)
    assert len(model.a._forward_hooks) == len(model.items[1]._forward_hooks) == 1
    assert set(attachment.marks) == {"a", "items.1"}


def test_cycles_end():
    model = shared_model()
    model.items.append(nn.Module())
    model.items[2].back = model
    assert [site.path for site in build_sites(model, LoraConfig())[1]] == ["a", "items.1"]


def test_compiled_wrappers_are_refused():
    model = shared_model()
    with pytest.raises(CaptureError, match=r"the model is wrapped by torch.compile.*_orig_mod"):
        Alias().run(Preparation(torch.compile(model), LoraConfig()))
    model.items[1] = torch.compile(model.items[1])
    with pytest.raises(CaptureError, match=r"the module at 'items\.1' is wrapped"):
        build_sites(model, LoraConfig())
