"""DoRA adapters beside plain ones and base rows, against PEFT's own dense merge of each row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error, save_adapter
from dora_cases import family_case
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, PlainModel, token_inputs
from torch import Tensor

import lorafx
from lorafx.errors import CheckpointError

pytestmark = pytest.mark.any_sizes

NAMES = ["d0", None, "p2", "d1", "d3", "d0"]
MIXES = (NAMES, NAMES[::-1], ["d1", "d1", "p2", "d3", None, None], ["p2", None] * 3)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def make(family: str) -> Case:
        if family not in made:
            layers = {"num_hidden_layers": 1} if family != "plain" else {}
            made[family] = family_case(family, tmp_path_factory.mktemp(family), **layers)
        return made[family]

    return make


@pytest.fixture(scope="module")
def plain(cases: Callable[[str], Case]) -> Case:
    return cases("plain")


@pytest.fixture(scope="module")
def served(cases: Callable[[str], Case]) -> Any:
    """A compiled Llama for the module: its graphs are shared as in use."""
    return cases("llama").compile()


def inputs(length: int = 5, rows: int = len(NAMES)) -> dict[str, Tensor]:
    torch.manual_seed(length)
    return token_inputs(rows, length)


def plain_inputs(rows: int = len(NAMES)) -> dict[str, Tensor]:
    torch.manual_seed(rows)
    return FAMILIES["plain"].inputs(rows, 4)


def graphs(cm: Any) -> int:
    return len(cm._session.backend.records)


def gains(cm: Any, name: str) -> dict[str, Tensor]:
    """What the bank holds for an adapter, by the path of the site."""
    slot = cm._session.store.acquire([name])[0]
    program = cm._session.program
    found = {}
    for site in program.sites:
        bank = program.site_bank(site)
        assert bank.gains is not None
        found[site.path] = bank.gains[slot].clone()
    return found


def test_mixed_batches_recompile_nothing(cases, served):
    case = cases("llama")
    check_mixed(served, case, NAMES, inputs())
    before = graphs(served)
    for length, names in enumerate(MIXES, 6):
        check_mixed(served, case, names, inputs(length))
    assert graphs(served) == before


def test_rows_that_are_not_dora_keep_their_bits(served):
    """Beside DoRA rows a plain or base row is what it is beside base rows."""
    x = inputs()
    mixed = served(**x, adapter_names=NAMES)["logits"]
    names = [name if name == "p2" else None for name in NAMES]
    alone = served(**x, adapter_names=names)["logits"]
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], alone[row]) == (NAMES[row] == name)


def test_weights_that_are_stored_transposed(cases):
    case = cases("gpt2")
    check_mixed(case.compile(dynamic=False), case, NAMES, inputs())


@pytest.mark.parametrize("lowering", ["inductor", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_in_inductors_code(plain, lowering):
    """Packed siblings with biases, an embedding, and a module that is called twice."""
    cm = plain.compile({"lowering": lowering}, dynamic=False)
    check_mixed(cm, plain, NAMES, plain_inputs())
    before = graphs(cm)
    for names in MIXES:
        check_mixed(cm, plain, names, plain_inputs())
    assert graphs(cm) == before
    told = str(cm.explain())
    assert "and DoRA's scales" in told
    assert "and DoRA's scales" in str(lorafx.explain(plain.model(), plain.folders["d1"]))
    assert told.count("rescale: 8 edits") == 1


PlainModelLinears = dict(PlainModel().named_children())


@pytest.mark.slow
def test_room_can_be_kept_for_later(plain, tmp_path):
    config = lorafx.LoraConfig(target_modules=list(PlainModelLinears), use_dora=True)
    cm = lorafx.compile(plain.model(), config, options=REFERENCE)
    cm.load_adapter(plain.folders["p2"], "p2")
    check_mixed(cm, plain, ["p2", None], plain_inputs(2))
    before = graphs(cm)
    for name in ("d0", "d1", "d3"):
        cm.load_adapter(plain.folders[name], name)
    check_mixed(cm, plain, NAMES, plain_inputs())
    assert graphs(cm) == before
    host = cm.memory()["host"]
    cm.load_adapter(plain.folders["p2"], "d1")  # a plain one in its place
    assert cm.memory()["host"] < host
    assert not any(gain.any() for gain in gains(cm, "d1").values())


def test_new_base_weights_are_measured_again(plain):
    """In place: neither graphs nor addresses change."""
    cm = plain.compile(dynamic=False)
    check_mixed(cm, plain, NAMES, plain_inputs())
    before = graphs(cm), [group.bank.gains.data_ptr() for group in cm._session.program.groups]
    torch.manual_seed(7)
    other = Case(copy.deepcopy(plain.base), plain.folders)
    with torch.no_grad():
        for own, new in zip(cm._orig_mod.parameters(), other.base.parameters(), strict=True):
            new.copy_(torch.randn_like(new) * new.std())
            own.copy_(new)
    assert (
        error(
            cm(**plain_inputs(), adapter_names=NAMES)["logits"],
            other.expected(NAMES, plain_inputs()),
        )
        > 100 * TOLERANCE
    )
    cm._session.store.refresh_magnitudes()
    check_mixed(cm, other, NAMES, plain_inputs())
    assert before == (graphs(cm), [g.bank.gains.data_ptr() for g in cm._session.program.groups])


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    return save_adapter(plain.base, tmp_path / "d", rank=2, targets=["up", "head"], use_dora=True)


BROKEN = {
    "absent": (lambda s, k: s.pop(k), "use_dora is set, but up has no lora_magnitude_vector"),
    "short": (lambda s, k: s.update({k: s[k][:-1]}), r"has shape \(19,\), up needs \(20,\)"),
    "nan": (lambda s, k: s[k].fill_(torch.nan), "magnitude_vector holds 20 NaN"),
    "alone": (
        lambda s, k: s.pop("base_model.model.up.lora_A.weight"),
        "up has no factor A",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case, plain, folder):
    change, message = BROKEN[case]
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    change(state, "base_model.model.up.lora_magnitude_vector")
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
    with pytest.raises(CheckpointError, match=message):
        lorafx.compile(plain.model(), {"d": folder})
