"""Generated tokens equal those of each row's merged model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from dense_merge import REFERENCE
from tiny_models import seq2seq_inputs, token_inputs

import lorafx
from lorafx.errors import BatchError, LorafxError

pytestmark = pytest.mark.any_sizes

NEW = 4
NAMES = ["a1", None, "a3", "a0"]
FIXED = {"pad_token_id": 0, "eos_token_id": None, "min_new_tokens": NEW, "max_new_tokens": NEW}


@pytest.fixture(scope="module")
def generated(llama):
    """One compiled model for the module, whose graphs are shared as in use, and whether each graph
    of its first prompts, of two sizes, was captured with adapters."""
    cm = llama.compile()
    for inputs in (prompts(), prompts(3, 7)):
        names = ["a1", None, "a3", "a0"][: len(inputs["input_ids"])]
        cm.generate(**inputs, **FIXED, do_sample=False, adapter_names=names)
    return cm, [record.lora for record in cm._session.backend.records]


@pytest.fixture(scope="module")
def served(generated):
    return generated[0]


def oracle_tokens(case: Any, names: Any, inputs: Any, **kwargs: Any) -> torch.Tensor:
    rows = []
    for index, name in enumerate(names):
        one = {key: value[index : index + 1] for key, value in inputs.items()}
        rows.append(case.alone(name).generate(**one, **FIXED, **kwargs))
    return torch.cat(rows)


def prompts(rows: int = len(NAMES), length: int = 5) -> dict[str, torch.Tensor]:
    """Left-padded prompts."""
    torch.manual_seed(rows)
    return token_inputs(rows, length)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": False},
        # In eager mode, quickly: test_rows_of_prompts.
        pytest.param({"do_sample": False, "use_cache": False}, marks=pytest.mark.slow),
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    ],
    ids=["greedy", "no-cache", "beams", "beams-returned"],
)
def test_tokens_are_those_of_the_merged_models(llama, served, kwargs):
    inputs = prompts()
    got = served.generate(**inputs, **FIXED, **kwargs, adapter_names=NAMES)
    want = oracle_tokens(llama, NAMES, inputs, **kwargs)
    assert torch.equal(got, want)
    check_changed(llama, got, inputs, **kwargs)


def check_changed(case: Any, got: torch.Tensor, inputs: Any, **kwargs: Any) -> None:
    """The adapters of `NAMES` did change what was generated, and the base's row is the base's."""
    base = oracle_tokens(case, [None] * len(NAMES), inputs, **kwargs)
    repeats = kwargs.get("num_return_sequences", 1)
    changed = (got != base).any(1).view(len(NAMES), repeats).any(1)
    assert not changed[NAMES.index(None)]
    assert int(changed.sum()) >= 2  # an adapter may leave the best of four tokens as they were


@pytest.mark.parametrize("returned", [1, 2])
def test_sampling(llama, served, returned):
    """With the same noise a row's sample does not depend on its neighbours' adapters: rows of a
    mixed batch are those of the single-adapter batches with the same seed."""
    inputs, names = prompts(3), ["a1", None, "a3"]
    kwargs = {**FIXED, "do_sample": True, "num_return_sequences": returned, "temperature": 2.0}
    torch.manual_seed(6)
    got = served.generate(**inputs, **kwargs, adapter_names=names)
    assert got.shape[0] == 3 * returned
    for row, name in enumerate(names):
        torch.manual_seed(6)
        want = llama.alone(name).generate(**inputs, **kwargs)
        own = slice(row * returned, (row + 1) * returned)
        assert torch.equal(got[own], want[own])


def test_positional_prompts_and_the_default_adapter(llama, served):
    inputs = prompts(2)
    mask = inputs["attention_mask"]  # without padding the graphs are others
    served.set_adapter("a3")
    try:
        got = served.generate(inputs["input_ids"], attention_mask=mask, **FIXED, do_sample=False)
    finally:
        served.set_adapter(None)
    assert torch.equal(got, oracle_tokens(llama, ["a3"] * 2, inputs, do_sample=False))


@pytest.mark.parametrize("start", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_encoder_decoder(case_of, start):
    """Its graphs, but for a cache, are in tests/models/test_oracle.py."""
    case = case_of("t5", num_layers=1, num_decoder_layers=1)
    torch.manual_seed(0)
    inputs = seq2seq_inputs(3, 6)
    del inputs["decoder_input_ids"]
    names = ["a1", None, "a2"]
    cm = case.compile({"start": start, "cache": None})
    for kwargs in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
        got = cm.generate(**inputs, **FIXED, **kwargs, adapter_names=names)
        assert torch.equal(got, oracle_tokens(case, names, inputs, **kwargs))
    assert "forward" not in vars(cm._orig_mod)
    assert "forward" not in vars(cm._orig_mod.get_encoder())


def test_forward_is_put_back(in_eager_mode, llama):
    """After success, after an exception in the middle, and with a forward of the user's own."""
    served = llama.compile()
    model, inputs = served.model, prompts(2)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("stopped in the middle")

    with pytest.raises(RuntimeError, match="stopped in the middle"):
        served.generate(**inputs, **FIXED, stopping_criteria=[fail], adapter_names=["a0", None])
    assert "forward" not in vars(model)
    own = type(model).forward.__get__(model)
    model.forward = own
    try:
        served.generate(**inputs, **FIXED, do_sample=False, adapter_names=["a0", None])
        assert vars(model)["forward"] is own
    finally:
        del model.forward


def test_what_cannot_be_generated(served, plain):
    inputs = prompts(3)
    with pytest.raises(BatchError, match="adapter_names has 2 entries, but the batch has 3 rows"):
        served.generate(**inputs, **FIXED, adapter_names=["a0", None])
    assert "forward" not in vars(served.model)
    with pytest.raises(LorafxError, match=r"PlainModel has no generate\(\); call the model itself"):
        plain.compile().generate(ids=torch.zeros(1, 2).long())


@pytest.mark.slow
def test_static_caches_keep_their_graphs_when_mixes_change(llama):
    cm, inputs, static = llama.compile(dynamic=False), prompts(), {"cache_implementation": "static"}
    none = [None] * len(NAMES)
    for names in (none, NAMES, ["a0", "a0", None, "a2"], none):
        got = cm.generate(**inputs, **FIXED, **static, do_sample=False, adapter_names=names)
        want = oracle_tokens(llama, names, inputs, do_sample=False, **static)
        assert torch.equal(got, want), names
        if names is NAMES:
            check_changed(llama, got, inputs, do_sample=False, **static)
    # Those of calls without an adapter are the base model's own.
    assert [record.lora for record in cm._session.backend.records] == [False, False, True, True]


def test_prompt_and_steps_are_one_graph_each(generated):
    """The prompt's keys are laid out as those of the steps behind it: Inductor's own decomposition
    of `torch.cat` copies them as they lie, and the second step would need another graph."""
    assert generated[1] == [True, True]


def test_a_model_that_does_not_tell_its_input_embedding() -> None:
    """Dia's `get_input_embeddings` raises NotImplementedError."""
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 40,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    cross = {"cross_num_attention_heads": 2, "cross_num_key_value_heads": 2, "cross_head_dim": 8}
    config = transformers.DiaConfig(
        encoder_config=transformers.DiaEncoderConfig(**sizes),
        decoder_config=transformers.DiaDecoderConfig(
            **sizes, **cross, cross_hidden_size=16, num_channels=3
        ),
        delay_pattern=[0, 1, 2], bos_token_id=37, eos_token_id=36, pad_token_id=35,
    )  # fmt: skip
    model = transformers.DiaForConditionalGeneration(config).eval()
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    lora = lorafx.LoraConfig(target_modules=["q_proj"])
    cm = lorafx.compile(model, lora, options={**REFERENCE, "start": "eager", "cache": None})
    assert cm.generate(torch.randint(0, 30, (2, 5)), max_new_tokens=3).shape == (2, 4, 3)
