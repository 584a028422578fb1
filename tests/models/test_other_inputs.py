"""Models of transformers whose earlier tokens come in an argument of another name, or (multiple
choice) whose requests have C rows each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_merge import TOLERANCE, Case, case_by_targets, check_mixed, error, random_base
from own_weights import own_case
from tiny_models import VOCAB, Family, token_inputs
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorafx.errors import BatchError

pytestmark = pytest.mark.any_sizes

SIZES = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "pad_token_id": 0} | {
    "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 66
}  # fmt: skip


class CallsItCache(LlamaForCausalLM):
    """As models of transformers do from 5.24 on."""

    def forward(self, input_ids: Tensor, cache: Any = None) -> Any:
        return super().forward(input_ids, None, None, cache, use_cache=True)


def test_earlier_tokens_are_known_as_cache(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4}
    base = random_base(Family(lambda **_: CallsItCache(LlamaConfig(**sizes, **heads)), ()))
    case, names = (
        case_by_targets(base, tmp_path, dict.fromkeys("ab", "all-linear")),
        ["a", None, "b"],
    )
    ids = token_inputs(3, 6)["input_ids"]
    cm = case.compile(dynamic=False)
    cache = cm(ids[:, :4], adapter_names=names).past_key_values
    got = cm(ids[:, 4:], cache=cache, adapter_names=names).logits
    for row, name in enumerate(names):
        with torch.no_grad():
            want = case.alone(name)(ids[row : row + 1]).logits[:, 4:]
        assert error(got[row : row + 1], want) <= TOLERANCE


def chosen(rows: int, choices: int, length: int) -> dict[str, torch.Tensor]:
    """All that such a model takes, with choices of unequal lengths."""
    torch.manual_seed(rows + choices)
    ids = torch.randint(1, VOCAB, (rows, choices, length))
    mask = torch.ones_like(ids)
    mask[0, 1, 3:] = 0
    positions = torch.arange(length).expand(rows, choices, length).contiguous()
    kinds = torch.zeros_like(ids)
    return {"input_ids": ids, "attention_mask": mask} | {
        "token_type_ids": kinds, "position_ids": positions
    }  # fmt: skip


def built(model: Any, folder: Path, targets: list[str]) -> tuple[Any, Case]:
    base = random_base(Family(lambda **_: model(model.config_class(**SIZES)), ()))
    configs = {
        "a": {"target_modules": [*targets, "dense"], "modules_to_save": ["classifier"]},
        "b": {"target_modules": targets},
    }
    case = own_case(base, folder, configs)
    return case.compile(), case


def test_each_request_has_its_adapter_in_all_choices(tmp_path):
    cm, case = built(transformers.BertForMultipleChoice, tmp_path, ["query", "value"])
    x = chosen(3, 2, 5)
    check_mixed(cm, case, ["a", None, "b"], x)
    captured = cm.recompiles
    check_mixed(cm, case, ["b", "a", None, "a"], chosen(4, 3, 6))  # also other choices, longer
    check_mixed(cm, case, [None, "b", "b"], x)
    assert cm.recompiles == captured
    check_mixed(cm, case, ["a"], chosen(1, 3, 6))
    x["attention_mask"] = torch.ones(3, 4, 5, dtype=torch.int64)
    with pytest.raises(BatchError, match=r"\(3, 2, 5\).*\(3, 4, 5\).*the same number C"):
        cm(**x, adapter_names=["a", None, "b"])
