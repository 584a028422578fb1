"""`lorafx.XLora` against PEFT's own X-LoRA model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import XLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from token_adapters import TARGETS, VOCABULARY, Served, inputs_of, llama
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import lorafx

pytestmark = pytest.mark.any_sizes


class Mixed:
    def __init__(self, build, folder: Path, **options) -> None:
        self.served, self.folder = (
            Served(build, folder, TARGETS[llama], **options),
            folder / "xlora",
        )
        for number in "01":
            self.served.cm.load_adapter(self.served.paths[f"a{number}"], number)

    def peft(self, **fields) -> nn.Module:
        """PEFT's model, saved into the folder."""
        torch.manual_seed(1)
        base = copy.deepcopy(self.served.base)
        base.config.use_cache = False
        adapters = {"0": self.served.paths["a0"], "1": self.served.paths["a1"]}
        config = XLoraConfig(hidden_size=32, adapters=adapters, xlora_size=24, **fields)
        model = get_peft_model(base, config).eval()
        for name, parameter in model.named_parameters():
            if "xlora_classifier" in name:
                nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(self.folder)
        state = {k: v for k, v in model.state_dict().items() if "xlora_classifier" in k}
        save_file(state, self.folder / "xlora_classifier.safetensors")
        return model


def qwen2() -> nn.Module:
    """Its q, k and v have biases."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))


@pytest.fixture(
    scope="module",
    params=[llama, pytest.param(qwen2, marks=pytest.mark.slow)],
    ids=["llama", "qwen2"],
)
def mixed(request, tmp_path_factory) -> Mixed:
    return Mixed(request.param, tmp_path_factory.mktemp("adapters"))


LAYERWISE = {"layerwise_scalings": True, "xlora_depth": 2, "scaling_pass_value": 0.3}
DEEP = {"xlora_depth": 3, "softmax_temperature": 0.5, "global_scaling_weight": 1.5}
FIELDS = [
    {},
    {**DEEP, **LAYERWISE, "top_k_lora": 1},
    DEEP,  # from here on slow: fields by themselves, and the ways to leave out a softmax
    {"top_k_lora": 1, "scaling_pass_value": 0.5},
    LAYERWISE,
    {"enable_softmax": False, "scaling_pass_value": 1.0},
    {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
]


@pytest.mark.parametrize(
    "fields",
    [pytest.param(f, marks=[pytest.mark.slow] * (i != 1)) for i, f in enumerate(FIELDS)],
    ids=lambda fields: ",".join(fields) or "defaults",
)
def test_logits_are_pefts(mixed: Mixed, fields) -> None:
    model = mixed.peft(**fields)
    xlora = lorafx.XLora(mixed.served.cm, mixed.folder)
    inputs = inputs_of(3, 6)
    with torch.no_grad():
        want = model(**inputs).logits
    torch.testing.assert_close(xlora(**inputs).logits, want, rtol=1e-5, atol=1e-5)
    assert (want - mixed.served.cm(**inputs).logits).abs().max() > 1e-3
    before = mixed.served.cm.recompiles
    xlora(**inputs_of(4, 5))
    assert mixed.served.cm.recompiles == before


def test_what_is_refused(tmp_path_factory) -> None:
    mixed = Mixed(llama, tmp_path_factory.mktemp("adapters"), start="eager", cache=None)
    mixed.peft()
    cm = mixed.served.cm
    xlora, ids = lorafx.XLora(cm, mixed.folder), inputs_of(2, 3)["input_ids"]
    for inputs, message in (
        ({"input_ids": ids, "past_key_values": object()}, "takes no past_key_values"),
        ({"input_ids": ids, "adapter_slots": ids}, "takes no adapter_slots"),
        ({}, r"takes the keyword input_ids \(B, T\)"),
        ({"input_ids": ids[0]}, "takes the keyword input_ids"),
        ({"input_ids": ids.tolist()}, "takes the keyword input_ids"),
    ):
        with pytest.raises(lorafx.BatchError, match=message):
            xlora(**inputs)

    def refused(error: type[lorafx.LorafxError], message: str) -> None:
        with pytest.raises(error, match=message):
            lorafx.XLora(cm, mixed.folder)

    file, config = (
        mixed.folder / name for name in ("xlora_classifier.safetensors", "adapter_config.json")
    )
    fields, tensors = json.loads(config.read_text()), load_file(file)
    for changes, error, message in (
        ({"peft_type": "LORA"}, lorafx.CheckpointError, "peft_type 'LORA', not 'XLORA'"),
        ({"layerwise_scalings": True}, lorafx.CheckpointError, "no classifier of 12 outputs"),
        ({"adapters": {}}, lorafx.UnsupportedAdapterError, "0 adapters"),
        (
            {"adapters": {"0": "", "zz": ""}},
            lorafx.UnknownAdapterError,
            "'zz', which is not loaded",
        ),
        ({"adapters": {"0": ""}}, lorafx.CheckpointError, "no classifier of 1 outputs"),
        ({"top_k_lora": 3}, lorafx.ConfigError, "top_k_lora=3"),
        ({"top_k_lora": "1"}, lorafx.ConfigError, "top_k_lora='1'; give a number of its"),
        ({"top_k_lora": True}, lorafx.ConfigError, "top_k_lora=True"),
        ({"softmax_temperature": 0.0}, lorafx.ConfigError, r"softmax_temperature=0\.0"),
        ({"softmax_temperature": None}, lorafx.ConfigError, "softmax_temperature=None"),
        ({"softmax_temperature": 1e-300}, lorafx.ConfigError, "give a number above 0"),
        ({"global_scaling_weight": 1e300}, lorafx.ConfigError, "give a finite number"),
        ({"scaling_pass_value": float("nan")}, lorafx.ConfigError, "scaling_pass_value=nan"),
        ({"enable_softmax": "false"}, lorafx.ConfigError, "enable_softmax='false'; give true or"),
        ({"adapters": 3}, lorafx.UnsupportedAdapterError, "0 adapters"),
    ):
        config.write_text(json.dumps({**fields, **changes}))
        refused(error, message)
    config.write_text(json.dumps(fields))
    bias = next(key for key in tensors if key.endswith("bias"))
    for changes, message in (
        ({"other": torch.ones(1)}, "'other', which is no part"),
        ({f"layers.{'9' * 5000}.bias": torch.ones(1)}, "999, which is no part"),
        ({f"more.{bias}": torch.ones(2)}, "which is no part"),
        ({bias: torch.ones(3)}, "no classifier of 2 outputs"),
        ({bias: torch.ones(2, dtype=torch.int64)}, "other values than finite floats"),
        ({bias: torch.full((2,), torch.nan)}, "other values than finite floats"),
    ):
        save_file({**tensors, **changes}, file)
        refused(lorafx.CheckpointError, message)
    file.unlink()
    refused(lorafx.CheckpointError, "PEFT 0.21 leaves out the layers")
    (mixed.folder / "adapter_model.safetensors").unlink()
    refused(lorafx.CheckpointError, "has no classifier")
