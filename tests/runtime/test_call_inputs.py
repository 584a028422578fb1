"""What a call is given: taken by one rule, or refused with words before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_merge import REFERENCE, Case, save_adapter
from slowly import few
from tiny_models import token_inputs
from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

import lorafx
from lorafx.errors import BatchError, ConfigError, numbered

pytestmark = pytest.mark.quick

IDS = [[1, 2, 3], [4, 5, 6]]


@pytest.fixture(scope="module")
def cm(llama: Case) -> Any:
    return llama.compile()


@pytest.mark.parametrize(
    ("given", "error_class", "said"),
    [
        (IDS, ConfigError, r"input_ids is a list, .*torch.as_tensor\(input_ids\)"),
        (np.array(IDS), ConfigError, r"input_ids is a ndarray, .*torch.as_tensor\(input_ids\)"),
        (torch.tensor(IDS).float(), ConfigError, r"dtype torch.float32.*input_ids.long\(\)"),
        (torch.ones(0, 3, dtype=torch.int64), BatchError, r"no rows: input_ids \(0, 3\)"),
        (torch.ones(2, 0, dtype=torch.int64), BatchError, r"shape \(2, 0\), which has no tokens"),
    ],
)
@pytest.mark.parametrize("names", [None, ["a0"], ["a0", None]])
def test_inputs_that_are_none(
    cm: Any, given: Any, error_class: type[Exception], said: str, names: Any
) -> None:
    before = cm.recompiles
    for args, kwargs in (((given,), {}), ((), {"input_ids": given})):
        with pytest.raises(error_class, match=said):
            cm(*args, **kwargs, adapter_names=names)
    assert cm.recompiles == before


def test_generate(cm: Any) -> None:
    for args, kwargs in (((IDS,), {}), ((), {"input_ids": IDS})):
        with pytest.raises(ConfigError, match="input_ids is a list"):
            cm.generate(*args, **kwargs, adapter_names=["a0"], max_new_tokens=1)


def test_a_first_argument_that_is_no_tokens(in_eager_mode: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "input_feat_per_channel": 8,
    }
    ffn = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "conv_channels": 16}
    model = Speech2TextForConditionalGeneration(Speech2TextConfig(**sizes, **heads, **ffn)).eval()
    folder = save_adapter(model, tmp_path, rank=2, targets=["q_proj"], seed=0)
    features, limits = torch.randn(2, 12, 8), {"max_new_tokens": 3, "do_sample": False}
    want = model.generate(features, **limits)
    cm = lorafx.compile(model, {"a": folder}, options=REFERENCE)
    assert torch.equal(cm.generate(features, **limits), want)


def test_lists_that_a_model_of_other_names_is_given(plain: Case) -> None:
    cm = plain.compile()
    with pytest.raises(BatchError, match="the call has ids, a list and no tensor"):
        cm(ids=IDS, adapter_names=["a1", None])


@pytest.mark.parametrize("names", few([None, ["a0", None, "a1"]], None))
def test_32_bit_integers_run_the_graphs_of_64(llama: Case, names: Any) -> None:
    cm, inputs = llama.compile(), token_inputs(3, 4)
    want = cm(**inputs, adapter_names=names).logits
    graphs = cm.recompiles
    short = {name: value.int() for name, value in inputs.items()}
    assert torch.equal(cm(**short, adapter_names=names).logits, want)
    assert cm.recompiles == graphs


def test_as_many_names_as_prompts(llama: Case) -> None:
    """In a call, in `generate` and in `generate_batch` alike: none is for several rows."""
    cm, inputs = llama.compile(), token_inputs(4, 4)
    for names in (["a0"], ["a0"] * 2, ["a0"] * 5):
        said = f"adapter_names has {numbered(len(names), 'entry', 'entries')}"
        with pytest.raises(BatchError, match=f"{said}, but the batch has 4 rows"):
            cm(**inputs, adapter_names=names)
        with pytest.raises(BatchError, match=f"{said}, but the batch has 4 rows"):
            cm.generate(**inputs, adapter_names=names, max_new_tokens=2)
        with pytest.raises(BatchError, match=f"{said} for 4 prompts"):
            cm.generate_batch([[1, 2]] * 4, names, max_new_tokens=2)
