"""Batches of more adapters than there are slots, in waves: each row is its merged model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, check_mixed, error
from tiny_models import token_inputs
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList, StaticCache
from transformers.generation.logits_process import TemperatureLogitsWarper

import lorafx
from lorafx.errors import BatchError, CapacityError, UnknownAdapterError
from lorafx.generation.waves import waves_of

pytestmark = pytest.mark.any_sizes

NAMES = ["a1", None, "a3", "a0", "a1", "a4", "a2"]
NEW = 4
FIXED = {"pad_token_id": 0, "eos_token_id": None, "min_new_tokens": NEW, "max_new_tokens": NEW}
WAVES = {**REFERENCE, "overflow": "waves"}


def compiled(case: Any, slots: int = 2, **options: Any) -> Any:
    config = lorafx.LoraConfig(max_adapters=slots, max_rank=8)
    return lorafx.compile(case.model(), config, adapters=case.folders, options={**WAVES, **options})


@pytest.fixture(scope="module")
def served(llama):
    return compiled(llama)


@pytest.fixture
def eagerly(in_eager_mode, llama):
    return compiled(llama)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return token_inputs(len(NAMES), 5)


def test_rows_are_those_of_the_merged_models(llama, served, inputs):
    check_mixed(served, llama, NAMES, inputs)
    assert served.stats().evictions > 0
    before = served.recompiles
    check_mixed(served, llama, ["a4", "a3", "a2", "a1", "a0", "a0", None], inputs)
    assert served.recompiles == before


def test_refused_by_default(llama, inputs):
    cm = compiled(llama, overflow="refuse")
    with pytest.raises(CapacityError, match=r'max_adapters=5\) or Options\(overflow="waves"\)'):
        cm(**inputs, adapter_names=NAMES)


@pytest.mark.usefixtures("road")
def test_a_cache_that_is_returned_has_all_rows_and_is_not_taken_back(llama, served, inputs):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = served(input_ids=ids[:, :3], attention_mask=mask[:, :3], adapter_names=NAMES)
    cache = first.past_key_values
    assert cache.get_seq_length() == 3
    assert all(len(layer.keys) == len(NAMES) for layer in cache.layers)
    later = {"input_ids": ids[:, 3:], "attention_mask": mask}
    for given in (cache, StaticCache(config=llama.base.config, max_cache_len=8)):
        with pytest.raises(BatchError, match=r"'past_key_values' is a \w+Cache.*more adapters"):
            served(**later, past_key_values=given, adapter_names=NAMES)
    assert cache.get_seq_length() == 3
    # Where the batch fits, its rows go on.
    names = [name if name in ("a0", "a1") else None for name in NAMES]
    second = served(**later, past_key_values=cache, adapter_names=names)
    assert second.past_key_values is cache
    assert cache.get_seq_length() == 5


def test_generate(llama, eagerly, inputs):
    kwargs = {"num_beams": 2, "num_return_sequences": 2}
    with pytest.raises(BatchError, match="leave out return_dict_in_generate"):
        eagerly.generate(**inputs, **FIXED, return_dict_in_generate=True, adapter_names=NAMES)
    got = eagerly.generate(**inputs, **FIXED, do_sample=False, **kwargs, adapter_names=NAMES)
    rows = [
        llama.alone(name).generate(
            **{key: value[row : row + 1] for key, value in inputs.items()},
            **FIXED,
            do_sample=False,
            **kwargs,
        )
        for row, name in enumerate(NAMES)
    ]
    assert torch.equal(got, torch.cat(rows))


@pytest.mark.usefixtures("road")
def test_generated_rows_are_padded_to_the_longest(llama, eagerly, inputs):
    """Each wave ends when its rows have; the whole is what one batch gives."""
    kwargs = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    free = eagerly.generate(**inputs, **kwargs, eos_token_id=None, adapter_names=NAMES)
    lengths = set()
    for end in free[:, 5:8].unique().tolist():  # tokens that end some rows early
        got = eagerly.generate(**inputs, **kwargs, eos_token_id=end, adapter_names=NAMES)
        want = free.clone()
        for row in want:
            ends = (row[5:] == end).nonzero().flatten().tolist()
            if ends:
                row[5 + ends[0] + 1 :] = 0
        longest = int((want != 0).nonzero()[:, 1].max()) + 1
        assert torch.equal(got, want[:, :longest])
        lengths |= {int((row[5:] != 0).sum()) for row in want}
    assert len(lengths) > 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"past_key_values": DynamicCache()}, "'past_key_values' is a DynamicCache"),
        (
            {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(2.0)])},
            "'logits_processor' .*cannot be split",
        ),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [1]}, "'prefix_allowed_tokens_fn'"),
    ],
)
def test_generate_refuses_what_has_no_rows(served, inputs, extra, message):
    with pytest.raises(BatchError, match=message):
        served.generate(**inputs, **FIXED, **extra, adapter_names=NAMES)


def test_names_are_checked_before_the_first_wave(served, inputs):
    loads = served.stats().loads
    with pytest.raises(UnknownAdapterError, match="a9"):
        served(**inputs, adapter_names=[*NAMES[:-1], "a9"])
    with pytest.raises(BatchError, match="6 entries, but the batch has 7 rows"):
        served(**inputs, adapter_names=["a0", "a1", "a2", "a3", "a4", None])
    assert served.stats().loads == loads


def test_pinned_adapters_keep_their_slots(llama, served, inputs):
    served.pin_adapter("a3")
    try:
        check_mixed(served, llama, NAMES, inputs)
        assert "a3" in served._session.store.resident
        served.pin_adapter("a0")
        with pytest.raises(CapacityError):
            served(**inputs, adapter_names=NAMES)
        check_mixed(served, llama, ["a0", "a3", "a0", None, "a3", "a3", "a0"], inputs)
    finally:
        served.unpin_adapter("a3")
        served.unpin_adapter("a0")


def test_waves_are_few_and_even(served):
    """Adapters with slots come first, and no wave is left with one adapter of three."""
    store = served._session.store
    store.acquire(["a4", "a2"])
    waves = waves_of(store, [*NAMES, "a3"])
    assert sorted(row for wave in waves for row in wave) == list(range(len(NAMES) + 1))
    assert [len({NAMES[row] for row in wave if row < 7} - {None}) for wave in waves] == [2, 2, 1]
    assert {5, 6} <= set(waves[0])
    assert waves_of(store, NAMES[:1] * 3) is None


class Wide(nn.Module):
    """A dictionary of several kinds of results."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None, form: str = "") -> Any:
        y = self.down(x)
        if scale is not None:
            y = y * scale
        if form == "turned":
            return {"y": y.mT.flatten(0, 1)}
        if form == "loss":
            return {"loss": y.sum()}
        if form == "first":
            return {"first": float(y[0, 0, 0])}
        return {"y": y, "parts": (y[..., :1], None), "count": 3}


def test_results_of_a_plain_module(small):
    case = small(Wide, ["down"])
    config = lorafx.LoraConfig(max_adapters=1, max_rank=4, row_dims={"x": 0, "scale": None})
    cm = lorafx.compile(case.model(), config, adapters=case.folders, options=WAVES)
    x, names = torch.randn(5, 3, 6), ["a", "b", None, "b", "a"]
    got = cm(x, adapter_names=names)
    rows = [case.alone(name)(x[row : row + 1]) for row, name in enumerate(names)]
    assert error(got["y"], torch.cat([row["y"] for row in rows])) <= TOLERANCE
    assert torch.equal(got["parts"][0], got["y"][..., :1])
    assert got["parts"][1] is None
    assert got["count"] == 3
    for form, why in (
        ("turned", r"y has shapes \(12, 3\)"),
        ("loss", "loss has shapes"),
        ("first", "first is .* for some rows"),
    ):
        with pytest.raises(BatchError, match=why):
            cm(x, form=form, adapter_names=names)
    with pytest.raises(BatchError, match=r"'scale' .*declared to be shared"):
        cm(x, scale=torch.ones(4), adapter_names=names)
