"""Weights of adapters' own in tied models, scaled embeddings, classifiers, and where vocabularies
differ, against PEFT's own merge of each row."""

from __future__ import annotations

import copy
import json
from typing import Any

import oracle
import peft
import pytest
import torch
import transformers
from dense_merge import REFERENCE, TOLERANCE, check_mixed, error, random_base
from own_weights import own_case, train
from safetensors.torch import load_file, save_file
from slowly import few
from tiny_models import VOCAB, Family, right_padded, token_inputs

import lorafx
from lorafx.errors import CheckpointError

QV = ["q_proj", "v_proj"]


def inputs(rows: int, length: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows + length)
    found = token_inputs(rows, length)
    found["input_ids"][:, 3] = 5  # a token that was trained
    return found


def test_tied_weights(tmp_path):
    """Whole modules are apart as they were saved; trained tokens are the head's rows too."""
    base = random_base("llama", tie_word_embeddings=True)
    case = own_case(
        base,
        tmp_path,
        {
            "head": {"target_modules": QV, "modules_to_save": ["lm_head"]},
            "embed": {"target_modules": QV, "modules_to_save": ["embed_tokens"]},
            "tokens": {"target_modules": QV, "trainable_token_indices": [3, 5]},
            "lora": {"target_modules": QV},
        },
    )
    cm = case.compile()
    check_mixed(cm, case, ["head", "tokens", None, "embed", "lora"], inputs(5))
    # What trains both at once saves both.
    both = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    tied = own_case(base, tmp_path / "tied", {"both": {"target_modules": QV, **both}})
    check_mixed(tied.compile(), tied, ["both", None], inputs(2))


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "num_labels": 3,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "model", "targets"),
    few(
        [
            (transformers.RobertaConfig, transformers.RobertaForSequenceClassification, ["query"]),
            (transformers.LlamaConfig, transformers.LlamaForSequenceClassification, ["q_proj"]),
        ],
        transformers.LlamaConfig,
    ),
)
def test_classifiers(config, model, targets, tmp_path):
    """PEFT saves the head of a classifier unasked: one linear, with a bias or without, or two."""
    base = random_base(_family(model, config))
    plan = {"target_modules": targets, "task_type": "SEQ_CLS"}
    case = own_case(base, tmp_path, {"a": plan, "b": plan, "plain": {"target_modules": targets}})
    assert "modules_to_save" in (case.folders["a"] / "adapter_config.json").read_text()
    torch.manual_seed(0)
    x = right_padded(5, 6)
    x["input_ids"] *= x["attention_mask"]
    check_mixed(case.compile(), case, ["a", None, "b", "plain", "a"], x)


def test_room_by_a_peft_configuration(in_eager_mode, tmp_path):
    """Its names are endings, and PEFT lists heads that the model does not have."""
    base = random_base(_family(transformers.BertForSequenceClassification, transformers.BertConfig))
    plan = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    case = own_case(base, tmp_path, {"a": plan})
    config = json.loads((case.folders["a"] / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "score"]
    cm = lorafx.compile(case.model(), config, options=REFERENCE)
    assert "Linear, 24 -> 3, float32, room for 3 rows of an adapter's own" in str(cm.explain())
    cm.load_adapter(str(case.folders["a"]), "a")
    torch.manual_seed(0)
    check_mixed(cm, case, ["a", None], right_padded(2, 6))


def _family(model: Any, config: Any) -> Any:
    return Family(lambda **changes: model(config(**{**SMALL, **changes})), ())


def test_a_base_with_a_larger_vocabulary(in_eager_mode, tmp_path):
    """The base is resized for one adapter's new tokens. One that was trained without them has no
    logits for them."""
    small = random_base("llama")
    saved = {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]}
    before = own_case(small, tmp_path / "small", {"old": saved})
    large = copy.deepcopy(small)
    large.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    case = own_case(large, tmp_path / "large", {"new": saved})
    with pytest.raises(CheckpointError, match=r"has 65 rows.*resize_token_embeddings\(65\)"):
        lorafx.compile(small, case.folders)
    folders = {**case.folders, "old": before.folders["old"]}
    cm = lorafx.compile(case.model(), folders, options=REFERENCE)
    x = inputs(3)
    got = cm(**x, adapter_names=["new", "old", None])["logits"]
    want = before.expected(["old"] * 3, x)[1]
    assert error(got[1, ..., :VOCAB], want) <= TOLERANCE
    assert bool((got[1, ..., VOCAB:] == -torch.inf).all())
    x["input_ids"][0, 4] = VOCAB + 2  # a new token
    got = cm(**x, adapter_names=["new", "old", None])["logits"]
    assert error(got[[0, 2]], case.expected(["new", None, None], x)[[0, 2]]) <= TOLERANCE


def test_what_peft_saves_of_itself_where_a_vocabulary_grew(in_eager_mode, tmp_path):
    """By default `save_pretrained` writes all that the wrappers of embedding and head hold."""
    random_base("llama").save_pretrained(tmp_path / "base")

    def resized():
        base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(7)
        base.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
        return base.eval()

    config = peft.LoraConfig(r=2, target_modules=QV, modules_to_save=["lm_head", "embed_tokens"])
    wrapped = peft.get_peft_model(resized(), config)
    train(wrapped, 1)
    wrapped.save_pretrained(str(tmp_path / "a"))
    saved = load_file(tmp_path / "a" / "adapter_model.safetensors")
    head = "base_model.model.lm_head"
    copies = {f"{head}.original_module.weight", f"{head}.modules_to_save.weight"}
    assert copies <= saved.keys()
    cm = lorafx.compile(resized(), {"a": tmp_path / "a"}, options=REFERENCE)
    x = inputs(2)
    x["input_ids"][0, 4] = VOCAB + 1
    got = cm(**x, adapter_names=["a", None])["logits"]
    with torch.no_grad():
        want = wrapped.eval()(**oracle.one_row(x, 0))["logits"]
    assert error(got[:1], want) <= TOLERANCE
    saved[f"{head}.modules_to_save.weight"] += 1  # which of the two was trained?
    save_file(saved, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.modules_to_save\.weight"):
        cm.load_adapter(tmp_path / "a", "two")
