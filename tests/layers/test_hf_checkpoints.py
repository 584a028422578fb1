"""The example models: equal to the Hugging Face models whose checkpoints they load, and serving
adapters that PEFT trained on those."""

import copy

import oracle
import pytest
import torch
from tensor_parallel import example, llama_config
from tiny import randomise
from transformers import LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

import lorafx
from lorafx.layers import load_weights

pytestmark = pytest.mark.any_sizes

VOCAB = 61


def qwen_config(**changes):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
    }
    return Qwen3_5TextConfig(**{**sizes, **changes})


def build(family, **changes):
    """(Hugging Face model with random weights, the example model with the same)."""
    torch.manual_seed(0)
    if family == "llama":
        config = llama_config(**changes)
        reference, make = LlamaForCausalLM(config), example("parallel_llama").ParallelLlama
    else:
        config = qwen_config(**changes)
        reference, make = Qwen3_5ForCausalLM(config), example("parallel_qwen3_5").ParallelQwen35
    randomise(reference.eval().requires_grad_(False))
    model = make(config).eval()
    loaded = load_weights(model, iter(reference.state_dict().items()))
    assert loaded == set(model.state_dict())
    return reference, model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
        ("qwen3_5", {"tie_word_embeddings": True, "attention_bias": True}),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_hugging_face(family, changes):
    reference, model = build(family, **changes)
    ids = torch.randint(0, VOCAB, (2, 70))  # more than a chunk of the delta rule
    oracle.assert_close(model(ids), [reference(ids).logits])
    state = reference.state_dict()
    state.pop(next(name for name in state if "up_proj" in name))
    with pytest.raises(lorafx.CheckpointError, match=r"gate_up_proj\.weight: nothing .* slices 1"):
        load_weights(copy.deepcopy(model), state)


#: Adapters by the modules that they target, given the paths of all linears.
PLANS = {
    "llama": {
        "all": lambda name: True,
        "some": lambda name: name.endswith(("k_proj", "v_proj", "up_proj")),
        "whole": lambda name: name.endswith(("q_proj", "o_proj", "down_proj", "lm_head")),
    },
    "qwen3_5": {
        "all": lambda name: True,
        "delta": lambda name: name.endswith(("in_proj_qkv", "in_proj_b")),
        "gates": lambda name: name.endswith(("in_proj_z", "in_proj_a", "q_proj")),
    },
}


@pytest.mark.parametrize(
    ("family", "lowering"),
    [
        ("llama", "reference"),
        pytest.param("qwen3_5", "reference", marks=pytest.mark.slow),
        pytest.param("llama", "inductor", marks=pytest.mark.slow),
        pytest.param("qwen3_5", "inductor", marks=pytest.mark.slow),
    ],
)
def test_adapters_trained_on_hugging_face_names(family, lowering, tmp_path):
    # A tied head and embedding are two sites, each with a delta of its own.
    changes = {"tie_word_embeddings": True} if family == "llama" else {}
    reference, model = build(family, **changes)
    linears = oracle.linears(reference)
    folders = {}
    for rank, (name, chosen) in enumerate(PLANS[family].items(), start=2):
        targets = [path for path in linears if chosen(path)]
        if name == "whole":
            targets.append("model.embed_tokens")
        folders[name] = oracle.save_adapter(
            reference, tmp_path / name, rank=rank, targets=targets, seed=rank
        )
    cases = oracle.Oracle.of(reference, folders)
    cm = lorafx.compile(model, folders, options={"lowering": lowering})
    first, second, third = folders
    for names in ([first, None, second, third], [third, first]):
        ids = torch.randint(0, VOCAB, (len(names), 6))
        want = cases.rows(names, {"input_ids": ids})
        oracle.assert_close(cm(ids, adapter_names=names), want, label=str(names))
    apart = [cases.row(name, {"input_ids": ids[:1]}, 0)[0] for name in (None, *folders)]
    assert all(oracle.difference([y], apart[:1]) > 1e-2 for y in apart[1:])
