"""`adapter_gates`: several adapters with weights for each token, against W + Σ wᵢ ΔWᵢ applied token
by token."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from token_adapters import Served, bert, inputs_of, llama, opt
from torch import Tensor
from transformers import DynamicCache

import lorafx

pytestmark = pytest.mark.any_sizes

NAMES = ["a0", None, "a1"]


#: Gates find their tokens as slots do: in each family, quickly, in test_adapter_slots.
OTHERS = [pytest.param(build, marks=pytest.mark.slow) for build in (opt, bert)]


def test_no_waves_are_offered_where_tokens_have_adapters(tmp_path: Path) -> None:
    """Rows of other calls may be served in turn."""
    base = Served(llama, tmp_path)
    config = lorafx.LoraConfig(max_rank=8, max_adapters=1)
    cm = lorafx.compile(base.base, config, adapters=base.paths, options={"lowering": "reference"})
    gates = torch.tensor([[[0, 1]] * 3] * 2), torch.ones(2, 3, 2)
    for arguments, offered in (
        ({"adapter_gates": gates}, False),
        ({"adapter_slots": torch.tensor([[0, 1, 0], [1, 1, 0]])}, False),
        ({"adapter_names": ["a0", "a1"]}, True),
    ):
        with pytest.raises(lorafx.CapacityError, match="only 1 slots") as refused:
            cm(**inputs_of(2, 3), **arguments)
        assert ("waves" in str(refused.value)) is offered


@pytest.fixture(scope="module", params=[llama, *OTHERS], ids=["llama", "opt", "bert"])
def served(request, tmp_path_factory) -> Served:
    return Served(request.param, tmp_path_factory.mktemp("adapters"))


ONE_FAMILY = pytest.mark.parametrize("served", [llama], indirect=True)


def gates_of(*shape: int) -> tuple[Tensor, Tensor]:
    """Gates that point into NAMES; some tokens have none."""
    slots, weights = torch.randint(-1, 3, shape), torch.rand(shape)
    weights[torch.rand(shape) < 0.2] = 0
    return slots, weights


def mix_of(slots: Tensor, weights: Tensor) -> Tensor:
    """The weight of "a0" and "a1" for each token."""
    return torch.stack([(weights * (slots == place)).sum(-1) for place in (0, 2)], -1)


def check(
    served: Served, inputs: dict[str, Tensor], gates: tuple[Tensor, Tensor], cm=None
) -> Tensor:
    got = (cm or served.cm)(**inputs, adapter_names=NAMES, adapter_gates=gates)[0]
    want = served.mixed(mix_of(*gates), **inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    return got


def test_each_token_gets_its_mix(served: Served) -> None:
    for rows, length, count in ((1, 7, 2), (3, 6, 2), (4, 8, 1), (6, 6, 2)):
        check(served, inputs_of(rows, length), gates_of(rows, length, count))
    before = served.cm.recompiles
    for rows, length, count in ((5, 7, 1), (2, 9, 2)):
        check(served, inputs_of(rows, length), gates_of(rows, length, count))
    assert served.cm.recompiles == before


@pytest.mark.slow
@ONE_FAMILY
def test_three_gates_take_the_graph_of_four(served: Served) -> None:
    check(served, inputs_of(3, 5), gates_of(3, 5, 4))
    before = served.cm.recompiles
    check(served, inputs_of(2, 6), gates_of(2, 6, 3))
    assert served.cm.recompiles == before


@ONE_FAMILY
@settings(max_examples=25)
@given(data=st.data())
def test_any_gates(served: Served, data: st.DataObject) -> None:
    rows, length = data.draw(st.sampled_from([(2, 3), (4, 4), (3, 5)]))
    count, size = data.draw(st.integers(1, 2)), rows * length
    entries = st.lists(st.integers(-1, 2), min_size=size * count, max_size=size * count)
    shares = st.floats(0, 2, width=32)
    weights = data.draw(st.lists(shares, min_size=size * count, max_size=size * count))
    shape = rows, length, count
    gates = torch.tensor(data.draw(entries)).view(shape), torch.tensor(weights).view(shape)
    check(served, inputs_of(rows, length), gates)


@ONE_FAMILY
def test_rows_without_gates_are_the_base(served: Served) -> None:
    inputs, (slots, weights) = inputs_of(4, 5), gates_of(4, 5, 2)
    slots[1], weights[2], slots[3] = -1, 0, 1
    base = served.cm(**inputs)[0]
    got = check(served, inputs, (slots, weights))
    torch.testing.assert_close(got[1:], base[1:], rtol=1e-6, atol=1e-6)
    slots[0], weights[0] = gates_of(5, 2)  # no bit depends on other rows' gates
    assert torch.equal(check(served, inputs, (slots, weights))[1:], got[1:])
    got = check(served, inputs, (torch.full_like(slots, 1), weights))
    assert torch.equal(got, base)


@ONE_FAMILY
def test_one_mix_for_a_row_is_a_sum_of_adapters(served: Served) -> None:
    inputs = inputs_of(3, 5)
    slots = torch.tensor([[0, 2], [1, -1], [2, 2]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    sums = [{"a0": 0.5, "a1": 0.25}, None, "a1"]
    want = served.cm(**inputs, adapter_names=sums)[0]
    gates = {"adapter_names": NAMES, "adapter_gates": (slots, torch.nn.Parameter(weights))}
    before = served.cm.recompiles
    assert torch.equal(served.cm(**inputs, **gates)[0], want)
    assert served.cm.recompiles == before
    want = served.mixed(mix_of(slots, weights)[:, None].float().expand(-1, 5, -1), **inputs)
    torch.testing.assert_close(served.cm(**inputs, **gates)[0], want, rtol=1e-5, atol=1e-5)


def test_generated_tokens_have_the_mix_of_their_row(in_eager_mode: None, tmp_path) -> None:
    served, inputs = Served(llama, tmp_path), inputs_of(3, 5)
    slots = torch.tensor([[0, 2], [1, -1], [2, 2]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 1.0], [0.5, 0.5]])
    sums = [{"a0": 0.5, "a1": 0.25}, None, "a1"]
    gates = {"adapter_names": NAMES, "adapter_gates": (slots, weights)}
    settings = {"max_new_tokens": 4, "do_sample": False}
    tokens = served.cm.generate(**inputs, **gates, **settings)
    assert torch.equal(tokens, served.cm.generate(**inputs, adapter_names=sums, **settings))
    by_token = slots[:, None].expand(-1, 5, -1), weights[:, None].expand(-1, 5, -1)
    with pytest.raises(lorafx.BatchError, match=r"generate\(\) makes tokens.*give \(B, k\)"):
        served.cm.generate(**inputs, adapter_names=NAMES, adapter_gates=by_token)


@pytest.mark.slow
def test_tokens_behind_a_cache(tmp_path) -> None:
    """Chunks, and steps of one token, get what the whole gets. (Quickly: test_adapter_slots.)"""
    served = Served(llama, tmp_path)
    ids, (slots, weights) = inputs_of(3, 9)["input_ids"], gates_of(3, 9, 2)
    want = served.mixed(mix_of(slots, weights), input_ids=ids)
    past = DynamicCache(config=served.base.config)
    for start, end in ((0, 4), (4, 7), (7, 8), (8, 9)):
        got = served.cm(
            input_ids=ids[:, start:end],
            attention_mask=torch.ones_like(ids[:, :end]),
            past_key_values=past,
            adapter_names=NAMES,
            adapter_gates=(slots[:, start:end], weights[:, start:end]),
        )
        torch.testing.assert_close(got[0], want[:, start:end], rtol=1e-5, atol=1e-5)


@ONE_FAMILY
def test_a_gate_may_point_at_a_sum(served: Served) -> None:
    inputs, names = inputs_of(2, 4), [{"a0": 0.5, "a1": 2.0}, "a1"]
    slots, weights = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0.5, 0.25], [0.5, 0.25]])
    mix = torch.tensor([[0.25, 1.25], [0.0, 0.75]])[:, None].expand(-1, 4, -1)
    want = served.mixed(mix, **inputs)
    by_token = slots[:, None].repeat(1, 4, 1), weights[:, None].repeat(1, 4, 1)
    for gates in ((slots, weights), by_token):
        got = served.cm(**inputs, adapter_names=names, adapter_gates=gates)[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


S, W = torch.tensor([[[0, 2]] * 4] * 2), torch.full((2, 4, 2), 0.5)


@ONE_FAMILY
@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (S, r"a pair of tensors, \(slots, weights\)"),
        ((S.tolist(), W), "a pair of tensors"),
        ((S, W.to_sparse()), "which are dense and have values"),
        ((S.to("meta"), W), "which are dense and have values"),
        ((S, torch.nested.nested_tensor([W[0], W[1]])), "which are dense and have values"),
        ((W, S), "must be integers.*float32 and torch.int64"),
        ((S > 0, W), "must be integers.*torch.bool"),
        ((S, W[..., :1]), r"one shape.*\(2, 4, 2\) and \(2, 4, 1\)"),
        ((S[0, 0], W[0, 0]), r"one shape"),
        ((S[:, :, :0], W[:, :, :0]), r"one shape"),
        ((S + 1, W), "point at 1 to 3, but there are 3 adapters"),
        ((S - 2, W), "point at -2 to 0"),
        ((S, -W), r"the weight -0\.5; weights are finite, and 0 or more"),
        ((S, W / 0), "the weight inf"),
        ((S, W * torch.nan), "the weight nan"),
        (
            (S.repeat(1, 1, 9), W.repeat(1, 1, 9)),
            "have 18 adapters.* and may have 16",
        ),
        ((S[:, :3], W[:, :3]), r"adapter_gates have shape \(2, 3, 2\), and 'input_ids' \(2, 4\)"),
        ((S[:1], W[:1]), "should hold the 1 requests"),
        ((S[:1, 0], W[:1, 0]), "1 entry, but the batch has 2 rows"),
    ],
)
def test_gates_that_do_not_fit_are_refused(served: Served, gates, message: str) -> None:
    resident = served.cm.stats()
    with pytest.raises(lorafx.BatchError, match=message):
        served.cm(**inputs_of(2, 4), adapter_names=NAMES, adapter_gates=gates)
    assert served.cm.stats() == resident


@ONE_FAMILY
def test_gates_stand_alone(served: Served) -> None:
    with pytest.raises(lorafx.BatchError, match="adapter_slots and adapter_gates"):
        served.cm(**inputs_of(2, 4), adapter_slots=S[..., 0], adapter_gates=(S, W))
    with pytest.raises(lorafx.UnknownAdapterError, match="zz"):
        served.cm(**inputs_of(2, 4), adapter_names=["a0", "a1", "zz"], adapter_gates=(S, W))


@pytest.mark.usefixtures("road")
@ONE_FAMILY
def test_adapters_that_are_not_linear_in_a_weight(served: Served, tmp_path) -> None:
    wrapped = get_peft_model(
        copy.deepcopy(served.base), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    )
    wrapped.save_pretrained(tmp_path / "dora")
    cm = lorafx.compile(
        copy.deepcopy(served.base),
        {**served.paths, "dora": str(tmp_path / "dora")},
        options={"lowering": "reference"},
    )
    check(served, inputs_of(2, 4), (S, W), cm)  # beside room for magnitudes
    resident = cm.stats()
    with pytest.raises(lorafx.ConfigError, match="adapter_gates: 'dora' is a DoRA adapter"):
        cm(**inputs_of(2, 4), adapter_names=["a0", None, "dora"], adapter_gates=(S, W))
    assert cm.stats() == resident
    cm.merge("a0")
    with pytest.raises(lorafx.BatchError, match=r"'a0' is merged.*unmerge"):
        cm(**inputs_of(2, 4), adapter_names=NAMES, adapter_gates=(S, W))
    cm.unmerge()


@pytest.mark.parametrize("code", ["node_by_node", pytest.param(None, marks=pytest.mark.slow)])
def test_generated_kernels(code: str | None, request, tmp_path) -> None:
    """The kernels between aten's own operators, and in Inductor's code."""
    if code is not None:
        request.getfixturevalue(code)
    served = Served(llama, tmp_path, lowering="inductor")
    for rows, length in ((3, 6), (2, 5)):
        check(served, inputs_of(rows, length), gates_of(rows, length, 2))
