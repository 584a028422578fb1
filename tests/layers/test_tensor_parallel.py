"""Layers and LoRA cut among the ranks of a group of processes, against one process.

All ranks run in processes of their own with gloo; sizes are small.
"""

import oracle
import pytest
import tensor_parallel
import torch
import torch.distributed as dist
from tiny import randomise
from transformers import LlamaForCausalLM
from two_ranks import on_ranks

from lorafx.layers import Int8ChannelLinearMethod, RowParallelLinear, load_weights
from lorafx.layers.base import quantize_int8


@pytest.mark.slow
@torch.no_grad()
def test_two_ranks_compute_what_one_computes():
    torch.manual_seed(0)
    plain = tensor_parallel.layers()
    more = tensor_parallel.embedding_and_experts()
    for layer in (*plain.values(), *more.values()):
        for parameter in layer.parameters():
            parameter.normal_()
    state = {name: dict(layer.state_dict()) for name, layer in {**plain, **more}.items()}
    quantised = tensor_parallel.layers(quant_method=Int8ChannelLinearMethod())
    x = torch.randn(2, 3, 6)
    for found in on_ranks(2, tensor_parallel.run_layers, state, x):
        for name, layer in plain.items():
            y, int8, _ = found[name]
            load_weights(quantised[name], state[name])
            torch.testing.assert_close(y, layer(x))
            torch.testing.assert_close(int8, quantised[name](x))
        assert [found[name][2] for name in ("merged", "qkv", "one_kv_head", "row", "head")] == [
            (2, 5, 1),
            (6, 3, 3),
            (6, 3, 5),  # one KV head on both ranks
            (7,),
            (6,),  # 11 embeddings, one row of padding
        ]
        torch.testing.assert_close(found["embedding"], more["embedding"](torch.arange(11)))
        torch.testing.assert_close(found["experts"], more["experts"](x, x[..., :4]))
        assert found["refused"] == [
            "ColumnParallelLinear: output_size = 5 cannot be divided among tp_size = 2 ranks",
            "o_proj (RowParallelLinear): input_size = 5 cannot be divided among tp_size = 2 ranks",
            "MergedColumnParallelLinear: output_sizes[1] = 3 cannot be divided among tp_size = 2 "
            "ranks",
            "QKVParallelLinear: total_num_heads = 3 cannot be divided among tp_size = 2 ranks",
            "QKVParallelLinear: total_num_kv_heads = 3 cannot be divided among tp_size = 2 ranks",
            "VocabParallelEmbedding: num_embeddings = 1 is less than tp_size = 2",
            "FusedMoE: intermediate_size = 7 cannot be divided among tp_size = 2 ranks",
            "0 (Scaled): its class overrides forward, its weight is stored as torch.int8, and "
            "several ranks share it; see lorafx.register(handler=...)",
        ]
        assert found["sizes"] == [2, 1]


CASES = {
    "reference": ({"attention_bias": True}, {"lowering": "reference"}, False),
    # One KV head on both ranks.
    "inductor": ({"num_key_value_heads": 1, "mlp_bias": True}, {"lowering": "inductor"}, False),
    "int8": ({}, {"lowering": "reference"}, True),
}


@pytest.mark.parametrize(
    "case",
    [
        "reference",
        pytest.param("inductor", marks=pytest.mark.slow),
        pytest.param("int8", marks=pytest.mark.slow),
    ],
)
def test_mixed_batches_on_two_ranks(case, tmp_path):
    changes, options, quantised = CASES[case]
    torch.manual_seed(0)
    reference = LlamaForCausalLM(tensor_parallel.llama_config(**changes)).eval()
    randomise(reference.requires_grad_(False))
    linears = oracle.linears(reference)
    plans = {
        "all": (3, [*linears, "model.embed_tokens"]),
        "some": (2, [name for name in linears if name.endswith(("v_proj", "down_proj"))]),
    }
    folders = {
        name: oracle.save_adapter(reference, tmp_path / name, rank=rank, targets=targets, seed=rank)
        for name, (rank, targets) in plans.items()
    }
    state = reference.state_dict()
    if quantised:
        _quantise(reference)
    cases = oracle.Oracle.of(reference, folders)
    ids, names = torch.randint(0, 61, (4, 5)), ["all", None, "some", "all"]
    batches = [(ids, names), (ids[:2], [None, None])]
    work = (changes, state, folders, batches, options, quantised)
    ranks = on_ranks(2, tensor_parallel.run_llama, *work)
    for rank, (found, merged) in enumerate(ranks):
        for name, logits in merged.items():
            want = cases.rows([name] * len(ids), {"input_ids": ids})
            oracle.assert_close(logits, want, label=f"rank {rank}, {name} merged")
        eager = dict(zip(dict.fromkeys(names), found[len(batches) :], strict=True))
        for (rows, requests), logits in zip(batches, found[: len(batches)], strict=True):
            want = cases.rows(requests, {"input_ids": rows})
            oracle.assert_close(logits, want, label=f"rank {rank}, {requests}")
        for name, logits in eager.items():
            rows = ids[[row for row, other in enumerate(names) if other == name]]
            want = cases.rows([name] * len(rows), {"input_ids": rows})
            oracle.assert_close(logits, want, label=f"rank {rank}, eager, {name}")
    assert (
        oracle.difference(cases.rows(names, {"input_ids": ids}), [ranks[0][0][1][[0, 1, 0, 1]]])
        > 0.01
    )


@torch.no_grad()
def _quantise(model):
    """Round the decoder's linears to what int8 keeps of them."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            stored, scale = quantize_int8(module.weight)
            module.weight.copy_(stored.float() * scale[:, None])


@pytest.fixture
def lone_group(tmp_path):
    """A torch.distributed that is set up, with this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_one_rank_needs_no_collectives(lone_group):
    layer = RowParallelLinear(6, 4, tp_group=lone_group)
    assert (layer.tp_size, layer.tp_rank) == (1, 0)
    torch.testing.assert_close(
        layer(torch.ones(2, 6)), (layer.weight.sum(1) + layer.bias)[None].expand(2, 4)
    )
