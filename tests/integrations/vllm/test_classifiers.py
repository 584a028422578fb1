"""Classifiers in vLLM's engine: adapters of the trunk, with and without a head of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification
from vllm_engine import LINEARS, VOCABULARY, VllmEngine, prompts, randomise

pytest.importorskip("vllm")


def classifier(folder: Path) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def saved(folder: Path) -> list[Path]:
    """A model with three labels, and adapters: of its trunk, with a head of its own, of the head by
    LoRA."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        head_dim=32, num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=256,
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    randomise(model, 0.1)
    model.save_pretrained(folder / "model")
    adapters = []
    for name, targets, own in (
        ("trunk", [*LINEARS], None),
        ("own_head", [*LINEARS], ["score"]),
        ("head", [*LINEARS, "score"], None),
    ):
        lora = LoraConfig(r=4, target_modules=targets, modules_to_save=own)
        wrapped = get_peft_model(classifier(folder / "model"), lora)
        randomise(wrapped, 0.2, only="lora_")
        randomise(wrapped, 0.2, only="modules_to_save")
        adapters.append(folder / name)
        wrapped.save_pretrained(str(adapters[-1]))
    return adapters


def test_heads_of_classifiers(tmp_path: Path) -> None:
    adapters = saved(tmp_path)
    engine = VllmEngine(
        tmp_path / "model",
        runner="pooling",
        enforce_eager=True,
        max_loras=4,
        max_num_seqs=8,
        max_num_batched_tokens=256,
    )
    names = [None, *adapters, None, adapters[1]]
    requests = list(zip(prompts(len(names)), names, strict=True))
    found = engine.classify(requests)
    engine.close()
    for (prompt, adapter), logits in zip(requests, found, strict=True):
        alone = classifier(tmp_path / "model")
        if adapter is not None:
            alone = PeftModel.from_pretrained(alone, str(adapter))
        with torch.no_grad():
            want = alone(input_ids=torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(torch.tensor(logits), want, rtol=1e-4, atol=1e-4)
