"""What lorafx refuses inside of vLLM: adapters that vLLM would read otherwise, and other vLLMs."""

from __future__ import annotations

import inspect
import json
import pkgutil
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm_engine import Served, VllmEngine, prompts, tiny_llama

import lorafx
from lorafx.integrations.vllm import patches, plugin
from lorafx.integrations.vllm.checking import _layers_by_name
from lorafx.integrations.vllm.patches import PATCHES

pytest.importorskip("vllm")

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B_KEY = KEY.replace("lora_A", "lora_B")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return tiny_llama(tmp_path_factory.mktemp("vllm_refusals"), adapters=1)


@pytest.fixture(scope="module")
def engine(served: Served) -> Iterator[VllmEngine]:
    started = VllmEngine(
        served.model, enforce_eager=True, max_loras=2, max_num_seqs=4, max_num_batched_tokens=64
    )
    yield started
    started.close()


def _without(tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    del tensors[B_KEY]


def _narrow(tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    tensors[KEY] = tensors[KEY][:, :100].contiguous()


def _short(tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    tensors[B_KEY] = tensors[B_KEY][:100].contiguous()


def _of_another_layer(tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    for key in (KEY, B_KEY):
        tensors[key.replace("layers.0", "layers.9")] = tensors.pop(key)


def _infinite(tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    tensors[KEY][0, 0] = torch.inf


def _of_another_rank(tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    fields["r"] += 1


def _of_another_method(tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    fields["peft_type"] = "VERA"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_without, KEY),
        (_narrow, KEY),
        (_short, B_KEY),
        (_of_another_layer, KEY.replace("layers.0", "layers.9")),
        (_infinite, KEY),
        (_of_another_rank, "has rank 4"),
        (_of_another_method, "VERA"),
    ],
)
def test_adapters_that_vllm_reads_otherwise(
    served: Served,
    engine: VllmEngine,
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor], dict[str, Any]], None],
    named: str,
) -> None:
    """The error has the key, nothing has changed, and the engine serves on."""
    folder = tmp_path / "adapter"
    shutil.copytree(served.adapters[0], folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    damage(tensors, fields)
    save_file(tensors, weights)
    config.write_text(json.dumps(fields))
    error = engine.ask(do="load", folder=str(folder))
    assert isinstance(error, str)
    assert named in error
    requests = [(prompt, served.adapters[0]) for prompt in prompts(1)] + [(prompts(1)[0], None)]
    assert engine.run(requests) == served.expected(requests)


def test_adapters_of_the_text_model_of_a_multimodal_one() -> None:
    """vLLM 0.33 reads them without the prefix of that part; until then their keys match nothing."""
    from vllm.lora.model_manager import LoRAModelManager

    manager = LoRAModelManager.__new__(LoRAModelManager)
    manager.supports_mm, layer = True, object()
    manager.mm_mapping = SimpleNamespace(language_model=["language_model."])
    path = "model.layers.0.self_attn"
    manager.modules = {f"language_model.{path}.qkv_proj": layer}
    manager.packed_modules = {
        f"language_model.{path}.qkv_proj": [f"language_model.{path}.{each}_proj" for each in "qkv"]
    }
    layers = _layers_by_name(manager)
    assert layers[f"language_model.{path}.k_proj"] == (layer, 1)
    if hasattr(manager, "_get_text_lora_names"):
        assert layers[f"{path}.k_proj"] == (layer, 1)
    else:
        assert f"{path}.k_proj" not in layers


@pytest.fixture
def restored() -> Iterator[Callable[[], list[object]]]:
    """What stands where patches are put. Afterwards vLLM is as it was before."""
    places = []
    for patch in PATCHES:
        owner = pkgutil.resolve_name(patch.owner)
        places.append((owner if inspect.isclass(owner) else _holder(owner), patch.name))
    before = [inspect.getattr_static(owner, name) for owner, name in places]
    yield lambda: [inspect.getattr_static(owner, name) for owner, name in places]
    for (owner, name), value in zip(places, before, strict=True):
        setattr(owner, name, value)


def _holder(owner: object) -> Any:
    return owner if inspect.ismodule(owner) else type(owner)


def test_loading_the_plugin_again_changes_nothing(
    restored: Callable[[], list[object]],
) -> None:
    plugin.register()
    first = restored()
    plugin.register()
    assert all(a is b for a, b in zip(first, restored(), strict=True))


@pytest.mark.usefixtures("restored")
def test_graphs_on_disk_are_of_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM finds its compiled graphs by its configuration, which names the kernels."""
    from vllm.config import LoRAConfig, VllmConfig
    from vllm.platforms import current_platform

    plugin.register()
    config = VllmConfig()
    assert "lorafx" not in config.additional_config
    config.lora_config = LoRAConfig(lora_dtype="float16")
    current_platform.check_and_update_config(config)
    assert config.lora_config is not None
    first = config.compute_hash()
    monkeypatch.setattr(patches, "generators", lambda: "others")
    current_platform.check_and_update_config(config)
    assert config.compute_hash() != first


def _asked_for_lora() -> Any:
    from vllm.platforms import current_platform

    return current_platform.get_punica_wrapper()


@pytest.mark.usefixtures("restored")
def test_an_unknown_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused where LoRA is on, not before; or it computes LoRA itself, if asked to."""
    from vllm.version import __version__ as version

    monkeypatch.setattr(plugin, "TESTED", ("0.0.1",))
    monkeypatch.setenv(plugin.VARIABLE, "fallback")
    plugin.register()
    assert _asked_for_lora().endswith("PunicaWrapperCPU")
    monkeypatch.delenv(plugin.VARIABLE)
    plugin.register()
    with pytest.raises(lorafx.errors.UnsupportedVersionError, match=f"{version}.*LORAFX_VLLM=off"):
        _asked_for_lora()


@pytest.mark.usefixtures("restored")
def test_an_unknown_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.VARIABLE, "of")
    with pytest.raises(lorafx.ConfigError, match="off"):
        plugin.register()
