"""Checkpoints of W + ΔW: what from_pretrained makes of them, and the model that stays as it is."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, Case, build_case, check_mixed, error, valid
from expert_models import moe_case
from full_disk import no_file_over
from merging import bits
from safetensors import safe_open
from tiny_models import VOCAB, token_inputs
from torch import Tensor
from waiting import LONG

from lorafx.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("in_eager_mode")


def check_export(cm: Any, case: Case, name: str, folder: Path, inputs: dict[str, Tensor]) -> Any:
    """The written model gives the oracle's logits, nothing is missing; `cm` is as it was."""
    before, config = bits(cm._orig_mod), cm._orig_mod.config.to_dict()
    assert cm.export_merged(name, folder) == folder
    rows = len(next(iter(inputs.values())))
    loaded, report = type(cm._orig_mod).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        got = loaded.eval()(**inputs)["logits"]
    want = case.expected([name] * rows, inputs)
    assert error(valid(inputs, got), valid(inputs, want)) <= TOLERANCE
    base = case.expected([None] * rows, inputs)
    assert error(valid(inputs, want), valid(inputs, base)) > 100 * TOLERANCE
    assert all(torch.equal(cm._orig_mod.state_dict()[key], value) for key, value in before.items())
    assert cm._orig_mod.config.to_dict() == config
    assert cm.merged is None
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".safetensors") == [
        "config.json",
        "generation_config.json",
    ]
    return loaded


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "a3"), pytest.param("phi3", "a1", marks=pytest.mark.slow)]
)
def test_transformers_loads_it(family: str, name: str, tmp_path: Path) -> None:
    case = build_case(family, tmp_path / "adapters")
    cm = case.compile()
    cm._orig_mod.generation_config.top_k = 17
    cm._orig_mod.generation_config.do_sample = True
    loaded = check_export(cm, case, name, tmp_path / "merged", token_inputs(3, 5))
    assert loaded.generation_config.top_k == 17
    assert loaded.state_dict().keys() == cm._orig_mod.state_dict().keys()


def test_routed_experts_keep_the_names_of_the_hub(tmp_path: Path) -> None:
    """transformers writes a tensor an expert, as checkpoints have them."""
    case = moe_case("qwen3_moe", tmp_path / "adapters")
    cm = case.compile()
    inputs = {"input_ids": torch.randint(3, VOCAB, (3, 5))}
    for name in ("params", "older"):
        folder = tmp_path / name
        check_export(cm, case, name, folder, inputs)
        cm._orig_mod.save_pretrained(str(tmp_path / "base"))
        (file,), (base,) = (list(f.glob("*.safetensors")) for f in (folder, tmp_path / "base"))
        with safe_open(file, "pt") as written, safe_open(base, "pt") as plain:
            assert set(written.keys()) == set(plain.keys())


@pytest.mark.parametrize(("name", "tied"), [("a0", True), ("a1", False), ("a3", False)])
def test_tied_weights_that_are_told_apart_are_written_as_two(
    gpt2: Case, name: str, tied: bool, tmp_path: Path
) -> None:
    """a1 changes the head alone, a3 the embedding alone; a0 neither."""
    cm = gpt2.compile()
    assert cm._orig_mod.lm_head.weight is cm._orig_mod.transformer.wte.weight
    loaded = check_export(cm, gpt2, name, tmp_path, token_inputs(3, 5))
    assert loaded.config.tie_word_embeddings is tied
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) is tied
    assert cm._orig_mod.lm_head.weight is cm._orig_mod.transformer.wte.weight


def test_calls_go_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread is served while the files are written; a merge waits for them."""
    case = build_case("llama", tmp_path / "adapters")
    cm = case.compile()
    inputs = token_inputs(3, 5)
    names = ["a1", None, "a0"]
    want = cm(**inputs, adapter_names=names)["logits"]
    at_work, go_on, order = threading.Event(), threading.Event(), []
    save = type(cm._orig_mod).save_pretrained

    def slow(*args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        at_work.set()
        assert go_on.wait(LONG)
        order.append("written")
        return save(*args, state_dict=state_dict, **kwargs)

    monkeypatch.setattr(type(cm._orig_mod), "save_pretrained", slow)
    writing = threading.Thread(target=cm.export_merged, args=("a1", tmp_path / "merged"))
    writing.start()
    assert at_work.wait(LONG)
    assert torch.equal(cm(**inputs, adapter_names=names)["logits"], want)

    def merge() -> None:
        cm.merge("a0")
        order.append("merged")

    merging = threading.Thread(target=merge)
    merging.start()
    merging.join(0.2)
    assert cm.merged is None
    go_on.set()
    writing.join(LONG)
    merging.join(LONG)
    assert order == ["written", "merged"]
    loaded = type(cm._orig_mod).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        got = loaded(**inputs)["logits"]
    assert error(valid(inputs, got), valid(inputs, case.expected(["a1"] * 3, inputs))) <= TOLERANCE


def test_a_full_disk(gpt2: Case, tmp_path: Path) -> None:
    cm, inputs = gpt2.compile(), token_inputs(2, 4)
    with no_file_over(20_000), pytest.raises(CheckpointError, match=r"be written: .*too large"):
        cm.export_merged("a1", tmp_path / "full")
    assert not list((tmp_path / "full").glob("*.safetensors"))
    check_mixed(cm, gpt2, ["a1", None], inputs)
