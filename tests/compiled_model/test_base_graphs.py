"""`Options.base_graphs`: which graphs calls without an adapter run."""

from __future__ import annotations

import pytest
import torch
from dense_merge import Case, check_mixed, error
from tiny_models import FAMILIES, token_inputs
from torch import nn

import lorafx
from lorafx.errors import ProvenanceError

pytestmark = pytest.mark.any_sizes

SHARED = {"base_graphs": False}


@pytest.fixture(scope="module")
def served(llama: Case) -> lorafx.CompiledModel:
    cm = llama.compile(options=SHARED)
    cm.warmup(batch_sizes=(2,), lengths=(6,), generate=False)
    return cm


def base(case: Case, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return case.base(**inputs).logits


def test_half_as_many_graphs(llama: Case, served: lorafx.CompiledModel) -> None:
    """test_warmup.py counts twice as many, and those of one request as of several."""
    torch.manual_seed(0)
    assert served.recompiles == 2  # {prompt, decode}
    for rows, names in ((3, [None] * 3), (2, None)):
        inputs = token_inputs(rows, 7)
        got = served(**inputs, adapter_names=names).logits
        assert error(got, base(llama, inputs)) <= 1e-5
    check_mixed(served, llama, ["a0", None, "a1"], token_inputs(3, 5))
    assert served.recompiles == 2


@pytest.mark.slow
def test_graphs_of_one_request(llama: Case) -> None:
    cm = llama.compile(options=SHARED)
    cm.warmup(batch_sizes=(1,), lengths=(6,), generate=False)
    inputs = token_inputs(1, 7)
    assert error(cm(**inputs, adapter_names=[None]).logits, base(llama, inputs)) <= 1e-5
    check_mixed(cm, llama, ["a0"], inputs)
    assert cm.recompiles == 2


def test_merged_weights(llama: Case) -> None:
    torch.manual_seed(0)
    cm, inputs = llama.compile(options=SHARED, dynamic=False), token_inputs(2, 5)
    before = base(llama, inputs)
    assert error(cm(**inputs).logits, before) <= 1e-5
    cm.merge("a1")
    assert error(cm(**inputs).logits, llama.expected(["a1"] * 2, inputs)) <= 1e-5
    cm.unmerge()
    assert error(cm(**inputs, adapter_names=[None] * 2).logits, before) <= 1e-5
    assert cm.recompiles == 1


def test_before_an_adapter_is_loaded(plain: Case) -> None:
    torch.manual_seed(0)
    config = lorafx.LoraConfig(max_adapters=2, max_rank=8)
    cm = lorafx.compile(plain.model(), config, options={**SHARED, "lowering": "reference"})
    inputs = FAMILIES["plain"].inputs(3, 4)
    with torch.no_grad():
        want = plain.base(**inputs)["logits"]
    assert error(cm(**inputs)["logits"], want) <= 1e-5
    for name in ("a0", "a1"):
        cm.load_adapter(plain.folders[name], name)
    check_mixed(cm, plain, ["a0", None, "a1"], inputs)
    cm.unload_adapter("a0")
    assert error(cm(**inputs)["logits"], want) <= 1e-5
    assert cm.recompiles == 1


def test_inductor_and_what_a_layer_by_itself_computes(plain: Case) -> None:
    """Modules outside of calls are the base's, as ever."""
    torch.manual_seed(0)
    cm = plain.compile(options={"lowering": "inductor"})  # on a CPU they are shared by themselves
    inputs = FAMILIES["plain"].inputs(3, 5)
    with torch.no_grad():
        want = plain.base(**inputs)["logits"]
        assert error(cm(**inputs)["logits"], want) <= 1e-5
        check_mixed(cm, plain, ["a0", None, "a1"], inputs)
        assert torch.equal(cm._orig_mod(**inputs)["logits"], want)
    assert cm.recompiles == 1


class Neighbours(nn.Module):
    """Each request gets a share of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(61, 6), nn.Linear(6, 7), nn.Linear(7, 6)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        up = self.up(self.embed(ids))
        return {"logits": self.down(up + up.flip(0))}


def test_a_model_whose_rows_are_not_proved(small) -> None:
    case = small(Neighbours, ["up", "down"])
    torch.manual_seed(0)
    cm, inputs = case.compile(options=SHARED), FAMILIES["plain"].inputs(3, 4)
    with torch.no_grad():
        assert error(cm(**inputs)["logits"], case.base(**inputs)["logits"]) <= 1e-5
    with torch.no_grad():
        want = case.alone("a")(**inputs)["logits"]
    assert error(cm(**inputs, adapter_names=["a"] * 3)["logits"], want) <= 1e-5
    with pytest.raises(ProvenanceError):
        cm(**inputs, adapter_names=["a", None, "a"])


@pytest.mark.slow
def test_graphs_of_the_base_are_those_that_warm_up_made(llama: Case) -> None:
    """Until then calls without an adapter run the graphs with adapters."""
    torch.manual_seed(0)
    cm = llama.compile(options={"base_graphs": "warmup"})
    inputs, wanted = token_inputs(3, 5), [True]
    want = base(llama, inputs)
    check_mixed(cm, llama, ["a0", None, "a1"], inputs)
    assert error(cm(**inputs).logits, want) <= 1e-5
    assert lora(cm) == wanted
    plain = {"input_ids": inputs["input_ids"]}
    assert error(cm(**plain).logits, base(llama, plain)) <= 1e-5  # there is no graph for it yet
    wanted.append(True)
    assert error(cm(**inputs).logits, want) <= 1e-5
    assert lora(cm) == wanted
    cm.warmup(inputs, batch_sizes=(3,), lengths=(5,), generate=False)
    wanted += [False, False, True]  # and a step
    assert lora(cm) == wanted
    assert torch.equal(cm(**inputs).logits, want)
    check_mixed(cm, llama, ["a0", None, "a1"], inputs)
    assert lora(cm) == wanted


def lora(cm: lorafx.CompiledModel) -> list[bool]:
    """Which graphs are with adapters."""
    return [record.lora for record in cm._session.backend.records]


class Attentive(nn.Module):
    """Attention of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.up(self.attention(x, x, x, need_weights=False)[0])}


def test_by_itself(small, plain: Case) -> None:
    """What "auto" stands for follows from the device, the lowering and the model."""
    inductor = {"lowering": "inductor"}
    attentive = small(Attentive, ["up"])
    for cm, asked in (
        (plain.compile(options=inductor), False),
        (plain.compile(options={"lowering": "reference"}), True),
        (plain.compile(options={**inductor, "base_graphs": "warmup"}), "warmup"),
        (attentive.compile(options=inductor), True),
    ):
        assert cm.entry(cm._orig_mod).base_graphs == asked
    with pytest.raises(lorafx.ConfigError, match=r"Options.base_graphs must be one of auto"):
        plain.compile(options={"base_graphs": "never"})
