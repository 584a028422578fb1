"""Adapters that host memory has no room for are read again, and are the same then."""

from __future__ import annotations

import copy
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error, random_base, save_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from waiting import LONG

import lorafx
from lorafx.errors import CheckpointError, ConfigError, UnknownAdapterError

pytestmark = pytest.mark.usefixtures("in_eager_mode")

EMBEDDING = "base_model.model.model.embed_tokens"
NAMES = ["a0", "a1", "a2", "a3", "a4"]


@pytest.fixture
def case(plain, tmp_path) -> Case:
    """Adapters whose files a test may change."""
    folders = {
        name: Path(shutil.copytree(folder, tmp_path / name))
        for name, folder in plain.folders.items()
    }
    return Case(plain.base, folders, plain.merged)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"ids": torch.randint(0, 61, (2, 4))}


def compiled(case: Case, budget: int | None, slots: int = 1) -> Any:
    config = lorafx.LoraConfig(max_adapters=slots, max_rank=8, max_host_bytes=budget)
    return lorafx.compile(case.model(), config, adapters=case.folders, options=REFERENCE)


def sizes(case: Case) -> dict[str, int]:
    """The host memory of each adapter."""
    cm = compiled(case, None)
    return {name: cm.get_adapter(name).nbytes for name in NAMES}


def in_memory(cm: Any) -> list[str]:
    """The adapters in host memory when no call runs."""
    cm.prefetch_adapters([])
    return [name for name in cm.adapters if cm.get_adapter(name).nbytes]


def test_the_least_recently_used_go_and_come_back_as_they_were(case, inputs):
    size = sizes(case)
    budget = size["a3"] + size["a4"]
    cm = compiled(case, budget)
    assert in_memory(cm) == ["a3", "a4"]
    for name in [*NAMES, "a4", "a0"]:
        check_mixed(cm, case, [name, None], inputs)
        assert cm.memory()["host"] == sum(size[name] for name in in_memory(cm)) <= budget
        assert name in in_memory(cm)
    before, recompiles = cm.stats(), cm.recompiles
    check_mixed(cm, case, ["a0", "a0"], inputs)
    check_mixed(cm, case, ["a1", "a1"], inputs)
    after = cm.stats()
    assert cm.recompiles == recompiles
    host, disk = after.places["host"], after.places["disk"]
    assert host.misses == before.places["host"].misses + 1 == disk.hits
    assert host.hits + host.misses == after.loads
    assert host.evictions > 0 == disk.misses
    files = [file for folder in case.folders.values() for file in folder.iterdir()]
    assert after.nbytes["disk"] == sum(f.stat().st_size for f in files if f.suffix != ".md")


def test_without_a_budget_nothing_is_dropped(case, inputs):
    cm = compiled(case, None)
    check_mixed(cm, case, ["a0", None], inputs)
    check_mixed(cm, case, ["a1", None], inputs)
    assert in_memory(cm) == NAMES
    host = cm.stats().places["host"]
    assert (host.hits, host.misses, host.evictions) == (2, 0, 0)


@pytest.mark.parametrize("change", ["longer", "same size", "gone", "new"])
def test_files_that_changed_are_an_error_that_names_them(case, inputs, change):
    cm = compiled(case, 1)
    check_mixed(cm, case, ["a1", None], inputs)
    file = case.folders["a0"] / "adapter_model.safetensors"
    before = file.read_bytes()
    if change == "gone":
        file.unlink()
    elif change == "new":
        (case.folders["a0"] / "adapter_model.bin").write_bytes(b"")
    else:
        file.write_bytes(before + b" " if change == "longer" else before[:-1] + b"\7")
        os.utime(file, ns=(1, 1))
    said = {
        "longer": f"had {len(before)} bytes and has {len(before) + 1}",
        "same size": "was written again",
        "gone": "is gone",
        "new": r"adapter_model\.bin is new",
    }[change]
    resident = cm._session.store.resident
    with pytest.raises(CheckpointError, match=rf"'a0' .*max_host_bytes.*{said}.*load_adapter"):
        cm(**inputs, adapter_names=["a0", None])
    assert cm._session.store.resident == resident
    assert cm.stats().places["disk"].misses == 1
    check_mixed(cm, case, ["a1", None], inputs)
    save_adapter(case.base, case.folders["a0"], rank=3, targets=["up", "down"], seed=9)
    cm.load_adapter(case.folders["a0"], "a0")
    check_mixed(cm, Case(case.base, case.folders), ["a0", None], inputs)


def test_what_cannot_be_read_again_stays(case, inputs, tmp_path):
    """Pinned adapters, those of memory, and DoRA, whose norms follow the base weights."""
    save_adapter(case.base, tmp_path / "dora", rank=2, targets=["up"], seed=7, use_dora=True)
    case = Case(case.base, {**case.folders, "dora": tmp_path / "dora"}, case.merged)
    cm = compiled(case, 1, slots=2)
    fields = json.loads((case.folders["a3"] / "adapter_config.json").read_text())
    tensors = load_file(case.folders["a3"] / "adapter_model.safetensors")
    cm.load_adapter(lorafx.AdapterSource(tensors, config=fields), "a3")
    cm.pin_adapter("a1")
    for name in ("a0", "a2", "dora"):
        check_mixed(cm, case, [name, None], inputs)
    assert in_memory(cm) == ["a1", "a3", "dora"]
    cm.unpin_adapter("a1")
    check_mixed(cm, case, ["a2", "a3"], inputs)
    assert in_memory(cm) == ["a3", "dora"]


def test_calls_go_on_while_a_file_is_read(case, inputs):
    cm = compiled(case, 1, slots=2)
    check_mixed(cm, case, ["a1", None], inputs)
    host = cm._session.store.host
    read, reads, goes_on = host.reader, threading.Event(), threading.Event()

    def slow(source: Path, name: str) -> Any:
        reads.set()
        assert goes_on.wait(LONG)
        return read(source, name)

    host.reader = slow
    found: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: found.append(cm(**inputs, adapter_names=["a0", None])["logits"])
    )
    thread.start()
    try:
        assert reads.wait(LONG)
        check_mixed(cm, case, ["a1", None], inputs)  # would wait for ever
        assert not found
    finally:
        goes_on.set()
        thread.join(LONG)
    assert error(found[0], case.expected(["a0", None], inputs)) <= TOLERANCE


def test_held_versions_and_merged_adapters_need_no_file(case, inputs):
    """What requests of a continuous batch hold is in memory, though its file is another now."""
    cm = compiled(case, 1)
    store = cm._session.store
    hold = store.hold("a0")
    cm.load_adapter(case.folders["a2"], "a0")
    shutil.rmtree(case.folders["a0"])
    check_mixed(cm, case, ["a1", None], inputs)
    with cm._session.lock:
        got = cm(**inputs, adapter_names=[hold.name, None])["logits"]
    assert error(got, case.expected(["a0", None], inputs)) <= TOLERANCE
    got = cm(**inputs, adapter_names=["a0", None])["logits"]
    assert error(got, case.expected(["a2", None], inputs)) <= TOLERANCE
    del hold
    cm.merge("a3")
    shutil.rmtree(case.folders["a3"])
    assert in_memory(cm) == ["a3"]
    assert error(cm(**inputs)["logits"], case.expected(["a3", "a3"], inputs)) <= TOLERANCE
    cm.unmerge()
    check_mixed(cm, case, ["a1", None], inputs)


def test_sums_are_made_of_what_is_read(case, inputs):
    cm, wide = compiled(case, 1, slots=2), compiled(case, None, slots=2)
    scaled = {"a0": 1.0, "a1": 0.0}
    for names in (
        ["a0", None],
        [{"a1": 0.5, "a4": 2.0}, "a2"],
        [{"a4": 2.0, "a1": 0.5}, scaled],
        [{"a3": 0.5}, None],
    ):
        got, want = (model(**inputs, adapter_names=names)["logits"] for model in (cm, wide))
        assert error(got, want) <= TOLERANCE
    cm(**inputs, adapter_names=["a2", "a0"])
    assert in_memory(cm) == []
    assert cm.memory()["host"] == 0  # sums without a slot go too


def test_a_configuration_is_what_it_was_when_it_was_given(case, inputs):
    """Also where the adapter is read again."""
    fields = json.loads((case.folders["a0"] / "adapter_config.json").read_text())
    cm = compiled(case, 1)
    cm.load_adapter(lorafx.AdapterSource(case.folders["a0"], config=fields), "a0")
    want = cm(**inputs, adapter_names=["a0", None])["logits"]
    fields["lora_alpha"] = 99
    fields["target_modules"].clear()
    check_mixed(cm, case, ["a4", None], inputs)
    assert "a0" not in in_memory(cm)
    assert torch.equal(cm(**inputs, adapter_names=["a0", None])["logits"], want)


def test_warm_up_puts_back_the_slots_of_what_is_in_memory(case, inputs):
    cm = compiled(case, sizes(case)["a1"], slots=2)
    check_mixed(cm, case, ["a0", None], inputs)
    check_mixed(cm, case, ["a0", "a1"], inputs)
    assert in_memory(cm) == ["a1"]
    cm.warmup(inputs, generate=False, batch_sizes=(2,), lengths=(4,))
    assert in_memory(cm) == ["a1"]
    assert cm._session.store.resident == {"a1": 1}
    check_mixed(cm, case, ["a0", "a1"], inputs)


def test_prefetch(case, inputs):
    cm = compiled(case, sizes(case)["a0"])
    check_mixed(cm, case, ["a1", None], inputs)
    cm.prefetch_adapters(["a0", None])
    assert in_memory(cm) == ["a0"]
    reads = cm.stats().places["host"].misses
    check_mixed(cm, case, ["a0", None], inputs)
    assert cm.stats().places["host"].misses == reads
    with pytest.raises(UnknownAdapterError, match="a9"):
        cm.prefetch_adapters(["a1", "a9"])
    with pytest.raises(ConfigError, match="max_host_bytes must be a positive integer"):
        lorafx.LoraConfig(max_host_bytes=0)


def test_adapters_with_copies_of_base_weights_outlive_new_ones(inputs, tmp_path):
    """PEFT saves the base weight of an embedding that it trains, as it is then."""
    base, targets = random_base("llama"), ["q_proj", "embed_tokens"]
    folders = {
        name: save_adapter(base, tmp_path / name, rank=2, targets=targets) for name in ("b0", "b1")
    }
    for folder in folders.values():
        file = folder / "adapter_model.safetensors"
        copied = {f"{EMBEDDING}.base_layer.weight": base.get_input_embeddings().weight}
        save_file({**load_file(file), **copied}, file)
    config = lorafx.LoraConfig(
        target_modules=targets, max_adapters=1, max_rank=2, max_host_bytes=1000
    )
    cm = lorafx.compile(copy.deepcopy(base), config, adapters=folders, options=REFERENCE)
    cm.load_weights({name: 1.5 * weight for name, weight in base.state_dict().items()})
    for name in [*folders, *folders]:
        cm(inputs["ids"], adapter_names=[name, None])
    assert in_memory(cm) == [*folders]
    assert cm.stats().places["host"].misses == 0
