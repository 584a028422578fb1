"""load_weights: names, stacked parameters, tied weights, and every kind of mistake."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorafx
from lorafx.layers import (
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    load_weights,
)

pytestmark = pytest.mark.quick


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(6, 3, 2, 1)
        self.in_proj_qkvz = MergedColumnParallelLinear(6, [4, 4, 6, 6], bias=False)
        self.in_proj_ba = MergedColumnParallelLinear(6, [2, 2], bias=False)
        self.gate_up_proj = MergedColumnParallelLinear(6, [5, 5], bias=False)
        self.gate = ReplicatedLinear(6, 3, bias=False)  # a part of no other name
        self.down_proj = RowParallelLinear(5, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)


class Model(nn.Module):
    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "in_proj_qkvz": {"in_proj_qkv": (0, 1, 2), "in_proj_z": 3},
        "in_proj_ba": ["in_proj_b", "in_proj_a"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self) -> None:
        super().__init__()
        self.embed = VocabParallelEmbedding(11, 6)
        self.layers = nn.ModuleList([Layer()])
        self.head = ParallelLMHead(11, 6)
        self.head.weight = self.embed.weight


SHAPES = {
    "embed.weight": (11, 6),
    "layers.0.qkv_proj|q_proj.weight": (6, 6),
    "layers.0.qkv_proj|k_proj.weight": (3, 6),
    "layers.0.qkv_proj|v_proj.weight": (3, 6),
    "layers.0.qkv_proj|q_proj.bias": (6,),
    "layers.0.qkv_proj|k_proj.bias": (3,),
    "layers.0.qkv_proj|v_proj.bias": (3,),
    "layers.0.in_proj_qkvz|in_proj_qkv.weight": (14, 6),
    "layers.0.in_proj_qkvz|in_proj_z.weight": (6, 6),
    "layers.0.in_proj_ba|in_proj_b.weight": (2, 6),
    "layers.0.in_proj_ba|in_proj_a.weight": (2, 6),
    "layers.0.gate_up_proj|gate_proj.weight": (5, 6),
    "layers.0.gate_up_proj|up_proj.weight": (5, 6),
    "layers.0.gate.weight": (3, 6),
    "layers.0.down_proj.weight": (6, 5),
    "layers.0.norm.weight": (6,),
    "layers.0.norm.bias": (6,),
    "layers.0.norm.running_mean": (6,),
    "layers.0.norm.running_var": (6,),
}


def saved_name(name):
    """`a.packed|member.weight` is `a.member.weight` in checkpoints."""
    head, bar, tail = name.partition("|")
    return f"{head.rpartition('.')[0]}.{tail}" if bar else name


@pytest.fixture
def checkpoint():
    torch.manual_seed(0)
    tensors = {saved_name(name): torch.randn(shape) for name, shape in SHAPES.items()}
    return {**tensors, "layers.0.norm.num_batches_tracked": torch.tensor(7)}


def expected(checkpoint):
    """What each packed parameter should hold, by concatenation."""
    packed = {}
    for name in SHAPES:
        head, bar, tail = name.partition("|")
        if bar:
            own = f"{head}.{tail.rpartition('.')[2]}"
            packed.setdefault(own, []).append(checkpoint[saved_name(name)])
    plain = {name: checkpoint[name] for name in SHAPES if "|" not in name}
    return {**plain, **{name: torch.cat(rows) for name, rows in packed.items()}}


def check(model, checkpoint):
    state = model.state_dict()
    for name, value in expected(checkpoint).items():
        assert torch.equal(state[name], value), name
    assert torch.equal(state["head.weight"], checkpoint["embed.weight"])
    assert int(state["layers.0.norm.num_batches_tracked"]) == 7


@pytest.mark.parametrize("kind", ["mapping", "stream", "file"])
def test_loads_what_belongs_together(checkpoint, kind, tmp_path):
    model, file = Model(), tmp_path / "model.safetensors"
    save_file(checkpoint, file)
    weights = {"mapping": checkpoint, "stream": iter(checkpoint.items()), "file": file}[kind]
    loaded = load_weights(model, weights)
    assert loaded == set(model.state_dict())
    check(model, checkpoint)


def test_mistakes_are_listed_at_once_and_nothing_is_written(checkpoint):
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del checkpoint["layers.0.k_proj.weight"], checkpoint["layers.0.norm.running_mean"]
    checkpoint["layers.0.up_projj.weight"] = torch.zeros(5, 6)
    checkpoint["layers.0.in_proj_z.weight"] = torch.zeros(7, 6)
    checkpoint["layers.0.norm.weight"] = torch.zeros(5)
    checkpoint["layers.0.in_proj_qkvz.weight"] = torch.zeros(20, 6)
    with pytest.raises(lorafx.CheckpointError) as error:
        load_weights(model, checkpoint)
    assert isinstance(error.value, ValueError)
    lines = str(error.value).splitlines()
    assert lines[0] == "6 problems with the weights:"
    for part in (
        "layers.0.up_projj.weight: no place in the model; nearest: layers.0.",
        "layers.0.in_proj_z.weight: the checkpoint's tensor has shape (7, 6), expected (6, 6)",
        "layers.0.norm.weight: the checkpoint's tensor has shape (5,), expected (6,)",
        "layers.0.in_proj_qkvz.weight: a duplicate of layers.0.in_proj_qkv.weight",
        "layers.0.qkv_proj.weight: nothing in the checkpoint for slices 1",
        "layers.0.norm.running_mean: nothing in the checkpoint",
    ):
        assert any(part in line for line in lines), (part, lines)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_tied_weights_under_both_names(checkpoint):
    model = Model()
    load_weights(model, {**checkpoint, "head.weight": checkpoint["embed.weight"].clone()})
    check(model, checkpoint)
    del checkpoint["embed.weight"]
    other = {**checkpoint, "head.weight": torch.randn(11, 6)}
    load_weights(model, other)
    assert torch.equal(model.embed.weight, other["head.weight"])
    both = {**other, "embed.weight": torch.randn(11, 6)}
    with pytest.raises(lorafx.CheckpointError, match=r"ties it to head\.weight.*differ"):
        load_weights(model, both)


def packed(sizes, names, **options):
    model = nn.Module()
    model.mixer = MergedColumnParallelLinear(6, sizes, bias=False, **options)
    model.packed_modules_mapping = {"mixer": names}
    return model
