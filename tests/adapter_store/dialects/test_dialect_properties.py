"""Names round-trip, no key is lost, and whatever is in a file, it is read or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dialect_files import WRITERS, Tree, source
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lorafx
from lorafx.adapter_store.checkpoint import inspected, load_state
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.adapter_store.saved import AdapterState
from lorafx.config import LoraConfig
from lorafx.errors import (
    CheckpointError,
    LorafxError,
)
from lorafx.runtime.marking import build_sites

pytestmark = [
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore"),
]
DIALECTS = sorted(WRITERS)


NAMES = st.lists(st.sampled_from(["a", "b", "a_b", "b_a", "0", "1"]), min_size=1, max_size=3)


@st.composite
def trees(draw: st.DrawFn) -> list[str]:
    """Paths of linears, none below another one."""
    paths = sorted({".".join(parts) for parts in draw(st.lists(NAMES, min_size=1, max_size=5))})
    return [p for p in paths if not any(q != p and (q + ".").startswith(p + ".") for q in paths)]


def peft_folder(paths: list[str], folder: Path, rank: int) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {}
    for number, path in enumerate(paths):
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, 3 + number)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(4, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings_ = f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": 6}}'
    (folder / "adapter_config.json").write_text(settings_)
    return folder


@pytest.mark.parametrize("name", DIALECTS)
@settings(max_examples=8)
@given(paths=trees(), rank=st.integers(1, 3), data=st.data())
def test_names_round_trip_and_no_key_is_lost(
    name: str, paths: list[str], rank: int, data: st.DataObject, tmp_path_factory
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    peft = peft_folder(paths, folder / "peft", rank)
    model = Tree(paths)
    suffix = "" if name in ("mlx", "peft") else ".safetensors" if name != "loralib" else ".pt"
    file = WRITERS[name](peft, folder / f"file{suffix}")
    asked = source(name, peft, file)
    flat = [path.replace(".", "_") for path in paths]
    if name == "kohya" and len(set(flat)) < len(flat):
        with pytest.raises(CheckpointError, match=r" may be .* or .*, which are spelt alike"):
            load_state(asked, model)
        return
    _, sites = build_sites(model, LoraConfig(target_modules="all-linear"))
    want = read_adapter(peft, "a", sites, model=model)
    got = read_adapter(asked, "a", sites, model=model)
    assert got.weights.keys() == want.weights.keys() == set(paths)
    for path, weights in want.weights.items():
        assert torch.equal(got.weights[path].A, weights.A)
        assert torch.equal(got.weights[path].B, weights.B)
        assert got.weights[path].scale == pytest.approx(weights.scale)
    # One module more than the model has: named by the error, whatever the dialect.
    lost = data.draw(st.sampled_from(paths)) + ".none"
    other = peft_folder([*paths, lost], folder / "other", rank)
    suffix = suffix or "-folder"
    file = WRITERS[name](other, folder / f"more{suffix}")
    with pytest.raises(CheckpointError, match=r"\bnone\b|_none"):
        read_adapter(source(name, other, file), "a", sites, model=model)
    # A factor without its partner.
    state = load_state(asked, model)
    key = data.draw(st.sampled_from(sorted(state.tensors)))
    rest = {k: t for k, t in state.tensors.items() if k != key}
    with pytest.raises(CheckpointError, match="has no factor"):
        read_adapter(
            AdapterState(state.config, rest, "rest", state.scales), "a", sites, model=model
        )


ENDS = [
    *("lora_A.weight", "lora_B.weight", "lora_A", "lora_B", "lora_a", "lora_b", "m", "alpha"),
    *("lora_down.weight", "lora_up.weight", "lora.down.weight", "lora.up.weight", "dora_scale"),
    *("lora_magnitude_vector", "to_q_lora.down.weight", "lora_linear_layer.up.weight", "weight"),
    *("lora_embedding_A", "lora_embedding_B", "lora_A.weight.alpha", "lora.down.weight.alpha"),
    *("lora_A.a.default.weight", "lora_b.weight", "qkv_lora1.down.weight", "lora_B.bias", "diff"),
]
STARTS = ["", "unet.", "text_encoder.", "lora_unet_", "lora_te2_", "base_model.model.", "a.unet."]
STARTS += ["model.", "lycoris_", "clip_l.", "model.diffusion_model."]
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
CONFIGS = st.sampled_from(
    [
        None,
        {"r": 2, "lora_alpha": 4},
        {"lora_parameters": {"rank": 2, "scale": 2.0}, "fine_tune_type": "dora"},
        {"lora_alpha": 2},
    ]
)


@st.composite
def files(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of any shapes under keys made of what dialects' keys are made of."""
    found = {}
    for _ in range(draw(st.integers(0, 5))):
        parts = draw(NAMES) + draw(st.sampled_from([[], ["switch_mlp", "up"], ["processor"]]))
        join = draw(st.sampled_from([".", "_"]))
        key = draw(st.sampled_from(STARTS)) + join.join(parts) + "." + draw(st.sampled_from(ENDS))
        number = draw(st.sampled_from([0.0, 1.0, float("nan"), 1e38]))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
        value = torch.full(draw(SHAPES), 0.0 if dtype == torch.int64 else number)
        found[key] = value.to(dtype)
    return found


TREE = Tree(["a.b", "a_b", "b.a", "b.0", "unet.a", "0"])
_, TREE_SITES = build_sites(TREE, LoraConfig(target_modules="all-linear"))


@settings(max_examples=100)
@given(tensors=files(), config=CONFIGS, name=st.sampled_from([None, *DIALECTS]))
def test_whatever_is_in_a_file_it_is_read_or_refused(tensors, config, name) -> None:
    asked = lorafx.AdapterSource(tensors, config=config, dialect=name)
    try:
        state = load_state(asked, TREE)
        inspected(asked)
        adapter = read_adapter(state, "a", TREE_SITES, model=TREE)
    except LorafxError:
        return
    assert adapter.weights.keys() <= {site.path for site in TREE_SITES}
