"""A mixture of experts in vLLM's engine with lorafx's LoRA answers as dense merge; on a CPU vLLM
alone has no LoRA for one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from vllm_engine import VOCABULARY, Served, VllmEngine, prompts, randomise

pytest.importorskip("vllm")

HIDDEN, INTER, LAYERS, EXPERTS = 128, 96, 2, 4
#: Of a linear of each name: the features that go in and come out.
SIZES = {
    "gate_proj": (HIDDEN, INTER),
    "up_proj": (HIDDEN, INTER),
    "down_proj": (INTER, HIDDEN),
    "q_proj": (HIDDEN, HIDDEN),
}


class ServedExperts(Served):
    def merged(self, adapter: Path | None) -> nn.Module:
        model = Qwen3MoeForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        saved = {} if adapter is None else load_file(adapter / "adapter_model.safetensors")
        for key in (key for key in saved if "lora_A" in key):
            delta = 2 * saved[key.replace("lora_A", "lora_B")] @ saved[key]
            path = key.removeprefix("base_model.model.").split(".")
            layer, name = model.model.layers[int(path[2])], path[-3]
            _weight(layer, path, name).data.add_(delta)
        return model


def _weight(layer: nn.Module, path: list[str], name: str) -> Tensor:
    """The part of transformers' weight that an adapter's path names."""
    if name == "q_proj":
        return layer.self_attn.q_proj.weight
    experts, expert = layer.mlp.experts, int(path[5])
    if name == "down_proj":
        return experts.down_proj[expert]
    return experts.gate_up_proj[expert].chunk(2)[name == "up_proj"]


def save_expert_adapter(folder: Path, rank: int) -> Path:
    tensors = {}
    for layer in range(LAYERS):
        prefix = f"base_model.model.model.layers.{layer}"
        paths = [
            f"mlp.experts.{expert}.{name}" for expert in range(EXPERTS) for name in list(SIZES)[:3]
        ]
        for path in [*paths, "self_attn.q_proj"]:
            k, n = SIZES[path.rpartition(".")[2]]
            tensors[f"{prefix}.{path}.lora_A.weight"] = torch.randn(rank, k) * 0.15
            tensors[f"{prefix}.{path}.lora_B.weight"] = torch.randn(n, rank) * 0.15
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(
        json.dumps(fields | {"target_modules": sorted(SIZES)})
    )
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("vllm_experts")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * INTER,
        moe_intermediate_size=INTER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCABULARY,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = Qwen3MoeForCausalLM(config)
    randomise(model, 0.08)
    model.save_pretrained(folder / "model")
    adapters = [save_expert_adapter(folder / f"a{rank}", rank) for rank in (4, 9, 3)]
    return ServedExperts(folder / "model", adapters)


@pytest.fixture(params=["compiled", "eager"], scope="module")
def engine(served: Served, request: pytest.FixtureRequest) -> Iterator[VllmEngine]:
    started = VllmEngine(
        served.model,
        enforce_eager=request.param == "eager",
        max_loras=2,
        max_cpu_loras=4,
        max_num_seqs=8,
        max_num_batched_tokens=64,
    )
    yield started
    started.close()


def test_mixed_batches(served: Served, engine: VllmEngine) -> None:
    """Three adapters by turns in two slots, beside rows of the base."""
    a, b, c = served.adapters
    for names in ([a, None, b, a, None], [c, b, None], [None, None]):
        requests = list(zip(prompts(len(names)), names, strict=True))
        assert engine.run(requests) == served.expected(requests)
