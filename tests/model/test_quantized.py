"""LoRA over bases that a library has quantised: its kernels as they are, the delta beside them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from dense_merge import REFERENCE, error, save_adapter
from oracle import Oracle, difference
from packed_integers import AwqLinear, GptqLinear, PackedLinear
from quantised import KINDS, ROUNDS, Rounded, adapters, linears, small_base
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import lorafx
from lorafx.layers import FusedMoE

pytestmark = pytest.mark.any_sizes

NAMES = ["a", None, "b", "a"]
#: Kinds that go the same ways as others do.
SLOW = (
    "torchao-int4",
    "torchao-int4-packed",
    "bitsandbytes-nf4",
    "torchao-int4-groups",
    "torchao-int8-dynamic",
    "torchao-fp8",
    "bitsandbytes-8",
    "bitsandbytes-8-outliers",
    "bitsandbytes-fp4",
    "awq",
    "gptq",
    "quant_method",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, dict[str, Path]]:
    base = small_base()
    return base, adapters(base, tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    lorafx.register(GptqLinear, dequantize=PackedLinear.dequantized, requantize=PackedLinear.store)
    lorafx.register(AwqLinear, dequantize=PackedLinear.dequantized)
    yield
    lorafx.unregister(GptqLinear)
    lorafx.unregister(AwqLinear)


def case_of(kind: str, saved: tuple[nn.Module, dict[str, Path]]) -> Rounded:
    base, folders = saved
    model = copy.deepcopy(base)
    KINDS[kind][0](model)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        model(**inputs())  # some libraries change what they hold in their first call
    return Rounded(base, model, folders)


def inputs(rows: int = len(NAMES), length: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"input_ids": torch.randint(3, 61, (rows, length), generator=generator)}


def looks(model: nn.Module) -> dict[str, Any]:
    """What anybody may ask of the model's modules: classes, attributes, parameters by identity."""
    return {
        path: (
            type(module),
            frozenset(vars(module)),
            {name: id(p) for name, p in module._parameters.items()},
            {name: id(b) for name, b in module._buffers.items()},
            id(getattr(module, "quant_method", None)),
            id(getattr(getattr(module, "weight", None), "quant_state", None)),
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS]
)
def test_mixed_batches(kind: str, saved: tuple[nn.Module, dict[str, Path]]) -> None:
    case, tolerance = case_of(kind, saved), KINDS[kind][1]
    model, given = copy.deepcopy(case.model), inputs()
    before, keys = looks(model), None
    if "bitsandbytes" not in kind:  # its state_dict() changes the weights
        keys = list(model.state_dict())
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    want = case.rows(list(NAMES), given)
    got = cm(**given, adapter_names=NAMES).logits
    assert error(got, want) <= tolerance
    base = case.rows([None] * len(NAMES), given)
    # LLM.int8 looks for columns of outliers in the whole batch, whoever's they are.
    assert error(got[1], base[1]) <= (ROUNDS if "outliers" in kind else 1e-5)
    for row, name in enumerate(NAMES):
        if name is not None:
            assert error(got[row], base[row]) > 2 * tolerance

    # The base alone is the library's own, bit by bit.
    with torch.no_grad():
        assert torch.equal(cm(**given).logits, case.model(**given).logits)
    assert looks(model) == before
    assert keys is None or list(model.state_dict()) == keys

    # W' + ΔW of what `dequantize` reads is as near as the kernel is to W'.
    dense = case.dense()
    kernel = error(base, dense.expected([None] * len(NAMES), given))
    assert error(got, dense.expected(NAMES, given)) <= 4 * kernel + 1e-5

    graphs = len(cm._session.backend.records)
    cm(**inputs(3, 7), adapter_names=["b", "b", None])
    assert len(cm._session.backend.records) == graphs
    cm.detach()
    hooks = [hook for module in model.modules() for hook in module._forward_hooks]
    assert hooks == []


def test_banks_have_the_compute_dtype(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    """Integers and bytes are no dtype to compute in, and a storage dtype is none either."""
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base, folders = saved
    model = copy.deepcopy(base).to(torch.bfloat16)
    for path, linear in linears(model):
        parent, _, name = path.rpartition(".")
        made = library.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_storage=torch.float32 if name == "q_proj" else torch.uint8,
        )
        made.load_state_dict(linear.state_dict())
        setattr(model.get_submodule(parent), name, made.to("cpu"))
    cm = lorafx.compile(model.eval(), folders, options=REFERENCE, dynamic=False)
    assert {group.bank.B.dtype for group in cm._session.program.groups} == {torch.bfloat16}
    assert not cm._session.program.packed
    given = inputs()
    got = cm(**given, adapter_names=NAMES).logits
    assert got.dtype == torch.bfloat16
    with torch.no_grad():
        assert error(got[1], model(**given).logits[1]) <= ROUNDS
    assert error(got[0], got[1]) > ROUNDS


class Outside(nn.Module):
    """Multiplies by the weight itself, past its module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.inner.weight)


def test_a_subclass_weight_used_outside_of_its_module_is_refused(tmp_path: Path) -> None:
    KINDS["torchao-int8"][0](model := Outside().eval().requires_grad_(False))
    plain = nn.ModuleDict({"inner": nn.Linear(64, 32, bias=False)})
    config = peft.LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False)
    peft.get_peft_model(plain, config).save_pretrained(str(tmp_path))
    cm = lorafx.compile(model, {"a": tmp_path}, options=REFERENCE, dynamic=False)
    x = torch.randn(2, 64)
    assert torch.equal(cm(x, adapter_names=[None, None]), model(x))
    with pytest.raises(
        lorafx.MatchError, match=r"inner: .*is how it is stored, and this use is out"
    ):
        cm(x, adapter_names=["a", "a"])


def test_a_weight_that_another_one_replaces(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    """Each object has graphs of its own, since Dynamo does not compare how it wraps its tensors."""
    first, second = (case_of(kind, saved) for kind in ("torchao-int4", "torchao-int4-groups"))
    cm = lorafx.compile(copy.deepcopy(first.model), first.folders, options=REFERENCE, dynamic=False)
    given, graphs = inputs(), 0
    for case in (first, second, case_of("torchao-int4-groups", saved)):
        for (_, old), (_, new) in zip(linears(cm._orig_mod), linears(case.model), strict=True):
            old.weight = new.weight
        got = cm(**given, adapter_names=NAMES).logits
        assert error(got, case.rows(NAMES, given)) <= 1e-5
        assert cm.recompiles > graphs
        graphs = cm.recompiles
        cm(**given, adapter_names=[*reversed(NAMES)])
        assert cm.recompiles == graphs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchao-int8", "bitsandbytes-8-outliers", "bitsandbytes-nf4"])
def test_inductor(kind: str, saved: tuple[nn.Module, dict[str, Path]]) -> None:
    case, given = case_of(kind, saved), inputs()
    cm = lorafx.compile(copy.deepcopy(case.model), case.folders, options={"lowering": "inductor"})
    got = cm(**given, adapter_names=NAMES).logits
    assert error(got, case.rows(NAMES, given)) <= KINDS[kind][1]


class Routed(nn.Module):
    """A router and its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4, bias=False)
        self.experts = FusedMoE(4, 2, 6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, self.gate(x))


def test_experts_held_by_a_subclass_are_refused_by_name(tmp_path: Path) -> None:
    """Their products are inside of one forward, where no hook stands between them; the router
    beside them is served."""
    torch.manual_seed(0)
    plain = Routed().eval().requires_grad_(False)
    folders = {
        "experts": save(plain, tmp_path / "experts", ["experts.w13_weight"]),
        "router": save(plain, tmp_path / "router", ["gate.weight"]),
    }
    case, model = Oracle.of(plain, folders), copy.deepcopy(plain)
    weight = model.experts.w13_weight
    model.experts.w13_weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    cm = lorafx.compile(model, folders, options=REFERENCE, dynamic=False)
    x = torch.randn(2, 3, 6)
    for names in ([None, None], ["router", None]):
        assert difference([cm(x, adapter_names=names)], case.rows(names, {"x": x})) <= 1e-5
    with pytest.raises(
        lorafx.MatchError, match=r"experts\.w13_weight.*in a quantised format.*no such switch"
    ):
        cm(x, adapter_names=["experts", "router"])


def save(base: nn.Module, folder: Path, parameters: list[str]) -> Path:
    return save_adapter(base, folder, rank=2, targets=[], seed=0, target_parameters=parameters)
