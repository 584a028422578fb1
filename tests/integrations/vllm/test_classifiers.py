"""Classifiers in vLLM's engine: adapters of the trunk, with and without a head of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)
from vllm_engine import LINEARS, VOCABULARY, VllmEngine, prompts, randomise

layers = pytest.importorskip("vllm.lora.layers")


def of_requests() -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        head_dim=32, num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=256,
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def of_tokens() -> PreTrainedModel:
    config = BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=256, num_labels=3,
    )  # fmt: skip
    return BertForTokenClassification(config)


def saved(folder: Path, model: PreTrainedModel, linears: tuple[str, ...], head: str) -> list[Path]:
    """The model, and adapters: of its trunk, with a head of its own, of the head by LoRA."""
    randomise(model, 0.1)
    model.save_pretrained(folder / "model")
    adapters = []
    for name, targets, own in (
        ("trunk", [*linears], None),
        ("own_head", [*linears], [head]),
        ("head", [*linears, head], None),
    ):
        lora = LoraConfig(r=4, target_modules=targets, modules_to_save=own)
        wrapped = get_peft_model(type(model).from_pretrained(folder / "model"), lora)
        randomise(wrapped, 0.2, only="lora_")
        randomise(wrapped, 0.2, only="modules_to_save")
        adapters.append(folder / name)
        wrapped.save_pretrained(str(adapters[-1]))
    return adapters


def check(folder: Path, model: PreTrainedModel, adapters: list[Path], task: str) -> None:
    """Rows of the base and of each adapter in one batch, against each alone in transformers."""
    engine = VllmEngine(
        folder / "model",
        runner="pooling",
        enforce_eager=True,
        max_loras=4,
        max_num_seqs=8,
        max_num_batched_tokens=256,
    )
    names = [None, *adapters, None, adapters[1]]
    requests = list(zip(prompts(len(names)), names, strict=True))
    found = engine.classify(requests, task)
    engine.close()
    for (prompt, adapter), logits in zip(requests, found, strict=True):
        alone = type(model).from_pretrained(folder / "model", dtype=torch.float32).eval()
        if adapter is not None:
            alone = PeftModel.from_pretrained(alone, str(adapter))
        with torch.no_grad():
            want = alone(input_ids=torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(torch.tensor(logits), want, rtol=1e-4, atol=1e-4)


def test_heads_of_classifiers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = of_requests()
    check(tmp_path, model, saved(tmp_path, model, LINEARS, "score"), "classify")


@pytest.mark.skipif(
    not hasattr(layers, "TokenClassificationHeadWithLoRA"),
    reason="vLLM before 0.33 has no LoRA for the head of a classifier of tokens",
)
def test_heads_of_classifiers_of_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = of_tokens()
    adapters = saved(tmp_path, model, ("query", "key", "value", "dense"), "classifier")
    check(tmp_path, model, adapters, "token_classify")
