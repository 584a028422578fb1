"""Models of transformers cut among ranks by its own tensor parallelism, against one process."""

import oracle
import placed_models
import pytest
import torch
import transformers
from tiny import randomise
from two_ranks import on_ranks

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS, **changes))


def saved(model, folder, routers=(), experts=()):
    """The model and its adapters on disk, and the oracle of both."""
    randomise(model.eval().requires_grad_(False))
    model.save_pretrained(folder / "base")
    plans = {
        "all": (3, oracle.linears(model)),
        "some": (2, [n for n in oracle.linears(model) if n.endswith(("v_proj", "down_proj"))]),
    }
    folders = {
        name: oracle.save_adapter(model, folder / name, rank=rank, targets=targets, seed=rank)
        for name, (rank, targets) in plans.items()
    }
    return folders, oracle.Oracle.of(model, folders)


@pytest.mark.parametrize(
    "options",
    [
        {"lowering": "reference", "start": "compiled"},
        {"lowering": "reference", "start": "eager"},
        pytest.param({"lowering": "inductor"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_mixed_batches(options, tmp_path):
    torch.manual_seed(0)
    folders, cases = saved(llama(attention_bias=True), tmp_path)
    ids, names = torch.randint(1, 61, (4, 5)), ["all", None, "some", "all"]
    batches = [(ids, names), (ids[:2], [None, None]), (ids[:3], ["some"] * 3)]
    for found in on_ranks(2, placed_models.serve, tmp_path / "base", folders, batches, options):
        assert (" eager" in found["status"]) == (options.get("start") == "eager")
        for (rows, requests), logits in zip(batches, found["logits"], strict=True):
            oracle.assert_close(logits, cases.rows(requests, {"input_ids": rows}))
        for row, (name, tokens) in enumerate(zip(names, found["tokens"], strict=True)):
            want = cases.model(name).generate(ids[row : row + 1], max_new_tokens=4, do_sample=False)
            assert torch.equal(tokens, want[0])
