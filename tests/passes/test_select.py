"""select: target forms on real modules, and every refusal with its message."""

from __future__ import annotations

import json

import pytest
import torch
from marking import attach_sites
from safetensors.torch import save_file
from torch import nn

import lorafx
from lorafx.config import LoraConfig
from lorafx.errors import CaptureError, CheckpointError, LorafxWarning, TargetError
from lorafx.passes.select import Alias
from lorafx.prepare.marking import build_sites
from lorafx.program.preparation import Preparation

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
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
    )
    for target, exclude in [
        ("all-linear", None),
        (["q_proj", "embed_tokens", "lm_head"], None),
        (r".*\.(up|down)_proj", ["layers.0.mlp.up_proj"]),
    ]:
        model = transformers.LlamaForCausalLM(config)
        mine = set(paths(model, target, exclude))
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=target, exclude_modules=exclude)
        )
        assert mine == set(wrapped.targeted_module_names)


def test_sizes_dtype_and_device():
    model = Model().to(torch.bfloat16)
    sites = build_sites(model, LoraConfig(target_modules=["embed", "k_proj"]))[1]
    assert [(s.in_features, s.out_features) for s in sites] == [(16, 8), (8, 4), (8, 4)]
    assert {s.dtype for s in sites} == {torch.bfloat16}
    assert {s.device.type for s in sites} == {"cpu"}
    assert sites[1].module is model.layers[0].k_proj


class Packed(nn.Linear):
    """Stores W as bytes, two values each, as 4-bit formats do."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        packed = torch.zeros(in_features * out_features // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_quantised_weights_take_the_declared_sizes_and_the_compute_dtype():
    model = Model(packed=Packed(8, 6)).to(torch.bfloat16)
    (site,) = build_sites(model, LoraConfig(target_modules=["packed"]))[1]
    assert (site.in_features, site.out_features) == (8, 6)
    assert site.dtype == torch.bfloat16
    model.packed.compute_dtype = torch.float16
    (site,) = build_sites(model, LoraConfig(target_modules=["packed"]))[1]
    assert site.dtype == torch.float16


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


def test_excluded_modules_need_not_be_able_to_carry_lora():
    """The way out that messages name."""
    model = Model(odd=nn.Conv2d(4, 4, 3))
    assert paths(model, r".*(odd|q_proj)", ["odd"]) == paths(Model(), ["q_proj"])


def test_an_adapter_of_a_transposed_convolution(tmp_path):
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 1), nn.Linear(4, 4))
    factors = {"A": torch.ones(2, 4, 1), "B": torch.ones(4, 2, 1)}
    tensors = {f"base_model.model.0.lora_{x}.weight": t for x, t in factors.items()}
    tensors |= {f"base_model.model.1.lora_{x}.weight": t[..., 0] for x, t in factors.items()}
    copies = {key: t.clone() for key, t in tensors.items()}
    save_file(copies, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["0", "1"]})
    )
    message = r"^0 \(ConvTranspose1d\): transposed convolutions .*an adapter has factors for it"
    with pytest.raises(TargetError, match=message):
        lorafx.compile(model, {"a": tmp_path})
    cm = lorafx.compile(model.eval(), lorafx.LoraConfig(), options={"lowering": "reference"})
    message = r"0 \(ConvTranspose1d\) cannot have factors: transposed convolutions"
    with pytest.raises(CheckpointError, match=message):
        cm.load_adapter(tmp_path, "a")


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
