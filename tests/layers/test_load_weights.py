"""load_weights: names, stacked parameters, tied weights, and every kind of mistake."""

import pytest
import torch
from torch import nn

import lorafx
from lorafx.layers import (
    Int8ChannelLinearMethod,
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
        self.head = ParallelLMHead(11, 6).tie_weights(self.embed)


#: The same as the class declares, as stacked-parameter mappings are usually written.
STACKED = [
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("in_proj_qkvz", "in_proj_qkv", (0, 1, 2)),
    ("in_proj_qkvz", "in_proj_z", 3),
    ("in_proj_ba", "in_proj_b", 0),
    ("in_proj_ba", "in_proj_a", 1),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
]
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


@pytest.mark.parametrize("stacked", [STACKED, None])
@pytest.mark.parametrize("as_stream", [True, False])
def test_loads_what_belongs_together(checkpoint, stacked, as_stream):
    model = Model()
    weights = ((n, t) for n, t in checkpoint.items()) if as_stream else checkpoint
    loaded = load_weights(model, weights, stacked=stacked)
    assert loaded == set(model.state_dict())
    check(model, checkpoint)


def test_takes_one_tensor_at_a_time(checkpoint):
    """A tensor may be freed once the next one is asked for."""
    model, alive = Model(), []

    def stream():
        for name, tensor in checkpoint.items():
            alive.append(tensor)
            if name == "layers.0.down_proj.weight":
                assert torch.equal(model.layers[0].gate.weight, checkpoint["layers.0.gate.weight"])
            yield name, tensor

    load_weights(model, stream())
    assert len(alive) == len(checkpoint)


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


def test_a_stream_stops_writing_at_the_first_mistake(checkpoint):
    model = Model()
    names = list(checkpoint)
    wrong = names.index("layers.0.in_proj_qkv.weight")
    checkpoint[names[wrong]] = torch.zeros(3, 6)
    before = model.layers[0].down_proj.weight.clone()
    with pytest.raises(lorafx.CheckpointError, match=r"in_proj_qkv\.weight.*\(3, 6\)"):
        load_weights(model, iter(checkpoint.items()))
    assert torch.equal(model.embed.weight, checkpoint["embed.weight"])  # came before
    assert torch.equal(model.layers[0].down_proj.weight, before)


def test_a_name_that_comes_twice(checkpoint):
    pairs = [*checkpoint.items(), ("layers.0.q_proj.weight", torch.zeros(6, 6))]
    with pytest.raises(lorafx.CheckpointError, match=r"layers\.0\.q_proj\.weight: a duplicate"):
        load_weights(Model(), pairs)


def test_parts_of_a_checkpoint(checkpoint):
    model = Model()
    some = {
        "layers.0.q_proj.weight": checkpoint["layers.0.q_proj.weight"],
        "vision.patch.weight": torch.zeros(3, 3),
    }
    with pytest.raises(lorafx.CheckpointError, match="vision"):
        load_weights(model, some)
    assert load_weights(model, some, strict=False) == {"layers.0.qkv_proj.weight"}
    assert torch.equal(model.layers[0].qkv_proj.weight[:6], some["layers.0.q_proj.weight"])
    with pytest.raises(lorafx.CheckpointError, match=r"\(5, 6\)"):
        load_weights(model, {"layers.0.q_proj.weight": torch.zeros(5, 6)}, strict=False)


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


def test_names_are_compared_by_segments():
    """`gate` must not be found inside `gate_proj`, nor `proj` inside `up_proj`."""
    model = nn.Module()
    model.pair = MergedColumnParallelLinear(6, [3, 2], bias=False)
    model.gate_proj = ReplicatedLinear(6, 4, bias=False)
    tensors = {
        "gate.weight": torch.randn(3, 6),
        "proj.weight": torch.randn(2, 6),
        "gate_proj.weight": torch.randn(4, 6),
    }
    load_weights(model, tensors, stacked=[("pair", "gate", 0), ("pair", "proj", 1)])
    assert torch.equal(model.pair.weight, torch.cat(list(tensors.values())[:2]))
    assert torch.equal(model.gate_proj.weight, tensors["gate_proj.weight"])


def test_a_mapping_holds_below_the_module_that_declares_it():
    outer = nn.Module()
    outer.text, outer.vision = Layer(), nn.Module()
    outer.text.packed_modules_mapping = {"in_proj_ba": ["in_proj_b", "in_proj_a"]}
    outer.vision.in_proj_ba = MergedColumnParallelLinear(6, [2, 2], bias=False)
    tensor = torch.ones(2, 6)
    assert load_weights(outer, {"text.in_proj_a.weight": tensor}, strict=False) == {
        "text.in_proj_ba.weight"
    }
    assert torch.equal(outer.text.in_proj_ba.weight[2:], tensor)
    with pytest.raises(lorafx.CheckpointError, match=r"vision\.in_proj_a\.weight: no place"):
        load_weights(outer, {"vision.in_proj_a.weight": tensor})


@pytest.mark.parametrize(
    "mapping", [{"in_proj_ba": "in_proj_b"}, {"in_proj_ba": 3}, {"in_proj_ba": ["a", "a"]}, [1]]
)
def test_malformed_mappings(mapping):
    layer = Layer()
    layer.packed_modules_mapping = mapping
    with pytest.raises(lorafx.ConfigError, match="packed_modules_mapping"):
        load_weights(layer, {})


def packed(sizes, names, **options):
    model = nn.Module()
    model.mixer = MergedColumnParallelLinear(6, sizes, bias=False, **options)
    model.packed_modules_mapping = {"mixer": names}
    return model


@pytest.mark.parametrize("as_stream", [True, False])
@pytest.mark.parametrize("quantised", [True, False])
def test_fewer_names_than_slices(as_stream, quantised):
    """Rows say where each name ends, whichever comes first."""
    method = Int8ChannelLinearMethod() if quantised else None
    model = packed([4, 4, 6, 6], ["qkv", "z"], quant_method=method)
    want = packed([4, 4, 6, 6], ["qkv", "z"], quant_method=method)
    rows = {"z.weight": torch.randn(6, 6), "qkv.weight": torch.randn(14, 6)}
    loaded = load_weights(model, iter(rows.items()) if as_stream else rows)
    assert loaded == set(model.state_dict())
    load_weights(want, {"mixer.weight": torch.cat([rows["qkv.weight"], rows["z.weight"]])})
    assert all(torch.equal(t, want.state_dict()[n]) for n, t in model.state_dict().items())

    half = {"z.weight": torch.zeros(6, 6)}
    assert load_weights(model, half, strict=False) == set()
    with pytest.raises(lorafx.CheckpointError, match=r"z\.weight: needs qkv\.weight too"):
        load_weights(model, half)
    wrong = {"qkv.weight": torch.zeros(12, 6), "z.weight": torch.zeros(8, 6)}
    with pytest.raises(lorafx.CheckpointError, match=r"slices of \(4, 4, 6, 6\) cannot be divided"):
        load_weights(model, wrong, strict=False)
    assert all(torch.equal(t, want.state_dict()[n]) for n, t in model.state_dict().items())
    with pytest.raises(lorafx.CheckpointError, match="2 names are declared for the 1 slices"):
        load_weights(packed([4], ["qkv", "z"]), half, strict=False)


class Reversed(nn.Module):
    """A parameter with a loader that its author wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4), requires_grad=False)

        def load(param, loaded, shard_id=None):
            assert loaded.shape == (4,), f"four entries, got {tuple(loaded.shape)}"
            param.data.copy_(loaded.flip(0))

        self.table.weight_loader = load


def test_loaders_of_other_modules():
    model = Reversed()
    assert load_weights(model, {"table": torch.arange(4.0)}) == {"table"}
    assert model.table.tolist() == [3, 2, 1, 0]
    with pytest.raises(lorafx.CheckpointError, match="table: four entries, got"):
        load_weights(model, iter([("table", torch.zeros(3))]))


def test_after_assignment_and_on_the_meta_device(checkpoint):
    model = Model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.head.tie_weights(model.embed)
    load_weights(model, checkpoint)
    check(model, checkpoint)
    with torch.device("meta"):
        empty = Model()
    with pytest.raises(lorafx.CheckpointError, match="meta device"):
        load_weights(empty, checkpoint)
