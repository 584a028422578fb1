"""The linear layers compute what nn.Linear computes, and load every form of checkpoint tensor."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lorafx
from lorafx.layers import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

pytestmark = pytest.mark.quick

# Sizes of the whole layer in, its output slices, constructor.
LAYERS = {
    "replicated": (6, (5,), lambda **o: ReplicatedLinear(6, 5, **o)),
    "column": (6, (5,), lambda **o: ColumnParallelLinear(6, 5, **o)),
    "row": (6, (5,), lambda **o: RowParallelLinear(6, 5, **o)),
    "merged": (6, (4, 1, 7), lambda **o: MergedColumnParallelLinear(6, [4, 1, 7], **o)),
    "qkv": (6, (12, 6, 6), lambda **o: QKVParallelLinear(6, 3, 4, 2, **o)),
    "value_heads": (6, (8, 2, 5), lambda **o: QKVParallelLinear(6, 2, 4, 1, v_head_size=5, **o)),
}
PACKED = [name for name, (_, sizes, _) in LAYERS.items() if len(sizes) > 1]


def whole(name, generator):
    """A weight and bias for all slices of a layer."""
    inputs, sizes, _ = LAYERS[name]
    return (
        torch.randn(sum(sizes), inputs, generator=generator),
        torch.randn(sum(sizes), generator=generator),
    )


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_is_nn_linear(name, bias, generator):
    inputs, sizes, make = LAYERS[name]
    layer = make(bias=bias)
    weight, b = whole(name, generator)
    layer.load_weight("weight", weight)
    reference = nn.Linear(inputs, sum(sizes), bias=bias)
    with torch.no_grad():
        reference.weight.copy_(weight)
        if bias:
            layer.load_weight("bias", b)
            reference.bias.copy_(b)
        x = torch.randn(2, 3, inputs, generator=generator)
        y = layer(x)
        captured = torch.compile(layer, backend="eager", fullgraph=True)(x)
        assert isinstance(y, torch.Tensor)
        assert torch.equal(y, reference(x))
        assert torch.equal(captured, y)
    assert (layer.bias is None) != bias
    assert set(layer.state_dict()) == ({"weight", "bias"} if bias else {"weight"})


@pytest.mark.parametrize("groups", [(0, 1, 2), ((0, 1), 2), (0, (1, 2)), ((2, 0), (1,)), (None,)])
@pytest.mark.parametrize("name", PACKED)
def test_slices_are_loaded_by_index_and_tuple(name, groups, generator):
    _, sizes, make = LAYERS[name]
    layer = make()
    weight, bias = whole(name, generator)
    for parameter, value in (("weight", weight), ("bias", bias)):
        slices = value.split(sizes)
        for group in groups:
            members = range(3) if group is None else group if isinstance(group, tuple) else (group,)
            layer.load_weight(parameter, torch.cat([slices[i] for i in members]), group)
        assert torch.equal(getattr(layer, parameter), value)


@pytest.mark.parametrize(
    ("shape", "shard_id", "said"),
    [
        ((12, 6), "k", r"attn\.qkv_proj\.weight \(shard id 'k'\).*\(12, 6\).*\(6, 6\).*\(24, 6\)"),
        ((6, 12), "q", r"qkv_proj\.weight.*\(6, 12\).*\(12, 6\)"),
        ((12, 6), (1, 0), r"shard id \(1, 0\).*\(12, 6\).*\(18, 6\)"),
        ((6, 6), "o", r"no shard id 'o'.*\(12, 6, 6\).*'q', 'k', 'v', 0, 1, 2"),
        ((6, 6), -1, "no shard id -1"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(shape, shard_id, said):
    layer = QKVParallelLinear(6, 3, 4, 2, prefix="attn.qkv_proj")
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=said) as error:
        layer.load_weight("weight", torch.zeros(shape), shard_id)
    assert isinstance(error.value, lorafx.LorafxError)
    assert torch.equal(layer.weight, before)


def test_a_parameter_of_another_name_or_without_memory_is_refused():
    layer = ReplicatedLinear(3, 2)
    with pytest.raises(lorafx.CheckpointError, match="has no parameter 'scale'"):
        layer.load_weight("scale", torch.zeros(2, 3))
    empty = ReplicatedLinear(3, 2, device="meta")
    with pytest.raises(lorafx.CheckpointError, match=r"meta.*to_empty"):
        empty.load_weight("weight", torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ReplicatedLinear(0, 4), "input_size must be a positive integer, got 0"),
        (lambda: MergedColumnParallelLinear(4, [4, 0]), r"output_sizes\[1\]"),
        (lambda: QKVParallelLinear(4, 2, 2, 0), "total_num_kv_heads"),
    ],
)
def test_sizes_are_checked(make, said):
    with pytest.raises(ValueError, match=said) as error:
        make()
    assert isinstance(error.value, lorafx.LorafxError)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_load_into_themselves(copied, generator):
    layer = MergedColumnParallelLinear(6, [4, 1, 7])
    twin = copied(layer)
    weight, _ = whole("merged", generator)
    twin.load_weight("weight", weight)
    assert torch.equal(twin.weight, weight)
    assert not torch.equal(layer.weight, weight)
