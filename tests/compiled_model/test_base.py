"""The base model stays what it was: its numbers, its files, its modules, its memory."""

from __future__ import annotations

import pytest
import torch
from dense_merge import TOLERANCE, check_mixed, error
from oracle import Oracle
from tiny_models import FAMILIES, token_inputs
from torch import nn

import lorafx
from lorafx.errors import CaptureError


def storages(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    found = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("family", ["llama", "plain"])
def test_without_adapters_the_reference_is_bit_equal_to_eager(llama, plain, family):
    torch.manual_seed(0)
    case = {"llama": llama, "plain": plain}[family]
    cm = case.compile()
    for rows in (3, 1):
        inputs = FAMILIES[family].inputs(rows, 5)
        with torch.no_grad():
            want = case.base(**inputs)["logits"]
        for names in ([None] * rows, ["__base__"] * rows, None):
            assert torch.equal(cm(**inputs, adapter_names=names)["logits"], want)


def test_without_adapters_inductor_is_bit_equal_to_torch_compile(plain):
    torch.manual_seed(0)
    cm = plain.compile(options={"lowering": "inductor", "base_graphs": True})
    inputs = FAMILIES["plain"].inputs(3, 5)
    check_mixed(cm, plain, ["a0", None, "a1"], inputs)
    with torch.no_grad():
        want = torch.compile(plain.model(), dynamic=False)(**inputs)["logits"]
    assert torch.equal(cm(**inputs)["logits"], want)


@pytest.mark.parametrize("lowering", ["reference", "inductor"])
def test_a_row_does_not_depend_on_its_neighbours_adapters(plain, lowering):
    """Inductor with generated kernels: bit-equal, each row's sums have a fixed order. Reference:
    rows of one adapter are multiplied together, and the GEMM's blocking depends on how many there
    are, so it is within fp32 rounding."""
    torch.manual_seed(0)
    cm = plain.compile(options={"lowering": lowering})
    inputs = FAMILIES["plain"].inputs(4, 5)
    one = cm(**inputs, adapter_names=["a1", "a0", None, "a3"])["logits"]
    for others in (["a2", "a2", "a4"], ["a1", "a1", "a1"], [None, None, None], ["a3", None, "a0"]):
        row = cm(**inputs, adapter_names=["a1", *others])["logits"][0]
        if lowering == "inductor":
            assert torch.equal(row, one[0])
        else:
            assert error(row, one[0]) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_state_dict_and_files_are_the_same(case_of, family, tmp_path):
    case = case_of(family)
    model = case.model()
    names = [(name, type(module), id(module)) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.shape, p.requires_grad) for name, p in model.named_parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    cm = lorafx.compile(model, case.folders, options={"lowering": "reference"})
    model.save_pretrained(tmp_path / "after")
    assert cm._orig_mod is model
    assert [(n, type(m), id(m)) for n, m in model.named_modules()] == names
    assert [(n, id(p), p.shape, p.requires_grad) for n, p in model.named_parameters()] == parameters
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    before = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert sorted(path.name for path in (tmp_path / "after").iterdir()) == before
    for name in before:
        old, new = (
            (tmp_path / "before" / name).read_bytes(),
            (tmp_path / "after" / name).read_bytes(),
        )
        assert old == new, name


def test_packed_weights_take_no_more_memory(case_of):
    model = case_of("llama").model()
    before = storages(model)
    cm = lorafx.compile(model, case_of("llama").folders, options={"lowering": "reference"})
    attention = model.model.layers[0].self_attn
    q, k = attention.q_proj.weight, attention.k_proj.weight
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert storages(model) == before
    assert cm.memory()["base"] == before - sum(b.nbytes for b in model.buffers())


def test_casting_after_compile_is_refused_where_weights_are_packed(llama):
    cm = llama.compile()
    torch.manual_seed(0)
    inputs = token_inputs(2, 4)
    check_mixed(cm, llama, ["a0", None], inputs)
    cm._orig_mod.to(torch.bfloat16)
    with pytest.raises(CaptureError, match=r"q_proj and its siblings have changed"):
        cm(**inputs, adapter_names=["a0", None])


def test_other_weights_loaded_after_compile_are_served(plain, tmp_path):
    torch.manual_seed(0)
    cm, inputs = plain.compile(), FAMILIES["plain"].inputs(3, 4)
    names = ["a1", None, "a3"]
    check_mixed(cm, plain, names, inputs)
    for assign in (False, True):
        state = {name: torch.randn_like(v) * 0.3 for name, v in plain.base.state_dict().items()}
        twin = plain.model()
        twin.load_state_dict(state)
        oracle = Oracle.of(twin, plain.folders)
        cm._orig_mod.load_state_dict({name: v.clone() for name, v in state.items()}, assign=assign)
        got = cm(**inputs, adapter_names=names)["logits"]
        assert error(got, oracle.rows(names, inputs)[0]) <= 1e-5
        assert torch.equal(cm(**inputs)["logits"], twin(**inputs)["logits"])
