"""Which part of a file is for which model of a pipeline, and which models those are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_pipelines as tiny
import torch
from dense_merge import REFERENCE
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store import saved, untrusted_files
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.adapter_store.saved import origin_of
from lorafx.config import LoraConfig
from lorafx.errors import CaptureError, CheckpointError, ConfigError
from lorafx.integrations.diffusers.components import loadable, parts_of
from lorafx.runtime.marking import build_sites


@pytest.fixture(scope="module")
def flux() -> Any:
    return tiny.pipeline("flux")


def pair(name: str, sizes: tuple[int, int], kohya: bool) -> dict[str, Tensor]:
    k, n = sizes
    a, b = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
    return {f"{name}.{a}.weight": torch.randn(2, k), f"{name}.{b}.weight": torch.randn(n, 2)}


TEXT = "text_model_encoder_layers_0_self_attn_q_proj"
FILES = {
    "diffusers": {
        **pair("transformer.transformer_blocks.0.attn.to_q", (16, 16), False),
        **pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", (8, 8), False),
    },
    "kohya, by the first implementation's names": {
        **pair("lora_unet_double_blocks_0_img_attn_proj", (16, 16), True),
        **pair(f"lora_te1_{TEXT}", (8, 8), True),
    },
    "of the denoiser alone, which no key names": pair(
        "transformer_blocks.0.attn.to_q", (16, 16), False
    ),
}


@pytest.mark.filterwarnings("error::lorafx.LorafxWarning")
@pytest.mark.parametrize("file", FILES)
def test_each_model_reads_its_part(file: str, flux: Any) -> None:
    models = loadable(flux, None)
    assert list(models) == ["transformer", "text_encoder"]
    bare = file.startswith("of the")
    source = lorafx.AdapterSource(FILES[file], config={"r": 2, "lora_alpha": 2} if bare else None)
    parts = parts_of(source, flux, models)
    assert set(parts) == ({"transformer"} if bare else set(models))
    for name, part in parts.items():
        _, sites = build_sites(models[name], LoraConfig(target_modules="all-linear"))
        adapter = read_adapter(part, "a", sites, model=models[name])
        (path,) = adapter.weights
        ends = ("to_q", "to_out.0") if name == "transformer" else ("q_proj",)
        assert path.endswith(ends)


def test_files_are_read_once_for_all_models(
    flux: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def safe_open(file: Path, **given: Any) -> Any:
        read.append(Path(file).name)
        return safetensors.safe_open(file, **given)

    monkeypatch.setattr(untrusted_files, "safe_open", safe_open)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b")}
    for file in files.values():
        safetensors.torch.save_file(FILES["kohya, by the first implementation's names"], file)
    compiled = lorafx.compile_pipeline(flux, adapters=files, options=REFERENCE)
    try:
        assert sorted(read) == ["a.safetensors", "b.safetensors"]
        assert [cm.adapters for cm in compiled.models.values()] == [("a", "b")] * 2
        compiled.load_adapter(files["a"], "c")
        assert len(read) == 3
    finally:
        compiled.detach()


def test_a_part_is_read_again_from_where_it_was(flux: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file(FILES["diffusers"], file)
    part = parts_of(file, flux, loadable(flux, None))["text_encoder"]
    origin = origin_of(part)
    assert origin is not None
    again = saved.read_source(origin.source)
    assert again.component == "text_encoder"
    assert isinstance(origin.source.source, Path)  # which keeps no tensors


def test_parts_that_are_for_no_model(flux: Any) -> None:
    models = loadable(flux, None)
    t5 = pair("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", (16, 8), False)
    with pytest.raises(CheckpointError, match="text_encoder_2, which is not compiled; name it by"):
        parts_of(t5, flux, models)
    assert set(parts_of(t5, flux, loadable(flux, ["text_encoder_2"]))) == {"text_encoder_2"}
    with pytest.raises(CheckpointError, match=r"text_encoder_3, which Flux.* does not have"):
        parts_of(pair("text_encoder_3.x", (2, 2), False), flux, models)
    both = {**FILES["diffusers"], **pair("unet.mid_block.a", (2, 2), False)}
    with pytest.raises(CheckpointError, match="unet and transformer, which are both transformer"):
        parts_of(both, flux, models)


def test_models_that_cannot_be_compiled(flux: Any) -> None:
    with pytest.raises(ConfigError, match="Linear is no pipeline of diffusers"):
        lorafx.compile_pipeline(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"no model 'unet'; it has .*transformer"):
        lorafx.compile_pipeline(flux, components=["unet"])
    with pytest.raises(
        ConfigError, match=r"FluxPipeline is no nn.Module.*compile_pipeline\(pipe\)"
    ):
        lorafx.compile(flux)
    flux.transformer.x_embedder._hf_hook = object()  # as accelerate's offloading leaves it
    try:
        with pytest.raises(CaptureError, match="transformer is moved between devices by accel"):
            loadable(flux, None)
    finally:
        del flux.transformer.x_embedder._hf_hook
