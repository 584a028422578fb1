"""aLoRA: each row is PEFT's own output for it alone, and the base before its invocation tokens."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import oracle
import pytest
import torch
from alora_cases import FIXED, Served, inputs_of, one
from dense_merge import REFERENCE, TOLERANCE, error
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lorafx
from lorafx import BatchError, ConfigError, LorafxWarning
from lorafx.adapter_store.checkpoint import inspected
from lorafx.adapter_store.peft_model import take_over
from lorafx.adapter_store.saved import AdapterSource
from lorafx.errors import MatchError, ProvenanceError

pytestmark = [
    pytest.mark.any_sizes,
    pytest.mark.usefixtures("road_of_module", "earlier_objects_frozen"),
    pytest.mark.filterwarnings("ignore:.*do not occur.*:lorafx.LorafxWarning"),
]

MIX = ("x", "y", None, "plain", "x", "y")


@pytest.fixture(scope="module")
def llama(road_of_module, tmp_path_factory) -> Served:
    """In graphs, warmed up for several requests of any length. (Quickly in graphs:
    test_alora_steps.)"""
    served = Served("llama", tmp_path_factory.mktemp("adapters"))
    if road_of_module == "compiled":
        served.cm.warmup(batch_sizes=(2,), lengths=(6,), generate=False)
        served.warmed = served.cm.recompiles
    return served


@pytest.fixture(scope="module")
def gpt2(road_of_module, tmp_path_factory) -> Served:
    return Served("gpt2", tmp_path_factory.mktemp("adapters"))


@pytest.fixture(params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def served(request) -> Served:
    return request.getfixturevalue(request.param)


def begun(inputs: dict[str, Tensor]) -> list[int | None]:
    """Invocation tokens written into rows 0, 1 and 4 of six; where the adapters of `MIX` begin."""
    ids = inputs["input_ids"]
    ids[0, 1:3] = ids[0, 4:6] = torch.tensor([5, 6])  # the last one counts
    ids[1, 5] = ids[4, 5] = 7  # of row 4's adapter they are not
    return [4, 5, None, 0, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("road_of_module", ["compiled"], indirect=True)
def test_warm_up_knows_of_it(llama) -> None:
    assert llama.warmed == 5  # {prompt, decode} × {base, adapters}, and one per token
    cm, graphs = llama.cm, llama.cm.recompiles
    inputs = inputs_of(4, 8)
    inputs["input_ids"][1, 4] = 7
    for names in (["x", "y", None, "plain"], ["y"] * 4):
        cm(**inputs, adapter_names=names)
    assert cm.recompiles == graphs


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_its_adapter_from_the_invocation_on_and_the_base_before(served, side) -> None:
    inputs = inputs_of(6, 9, side)
    begins = begun(inputs)
    got = served.cm(**inputs, adapter_names=list(MIX)).logits
    for row, (name, at) in enumerate(zip(MIX, begins, strict=True)):
        seen = inputs["attention_mask"][row].bool()
        own = one(inputs, row)
        want, base = served.alone(name, **own)[0], served.alone(None, **own)[0]
        assert error(got[row][seen], want[seen]) <= TOLERANCE
        before = seen.clone()
        before[9 if at is None else at :] = False
        assert error(got[row][before], base[before]) <= TOLERANCE
        if at is not None:
            seen[:at] = False
            assert error(want[seen], base[seen]) > 100 * TOLERANCE


def check_generated(served: Served, inputs: Any, names: Any, given: Any, peft: Any) -> Tensor:
    """Each row is PEFT's generation for it alone; the settings `given` and `peft` may differ."""
    got = served.cm.generate(**inputs, **FIXED, **given, adapter_names=list(names))
    for row, name in enumerate(names):
        want = served.generated(name, **one(inputs, row), **peft)
        assert torch.equal(got.sequences[row], want.sequences[0])
        for step, wanted in zip(got.logits, want.logits, strict=True):
            assert error(step[row], wanted[0]) <= TOLERANCE
    return got.sequences


@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("llama", None),
        pytest.param("llama", "static", marks=pytest.mark.slow),
        pytest.param("gpt2", None, marks=pytest.mark.slow),
    ],
)
def test_generation_goes_on_with_what_has_begun(request, family, cache) -> None:
    served = request.getfixturevalue(family)
    inputs = inputs_of(6, 9)
    begun(inputs)
    settings = {} if cache is None else {"cache_implementation": cache}
    check_generated(served, inputs, MIX, settings, settings)
    graphs = served.cm.recompiles
    again = inputs_of(4, 7)
    again["input_ids"][1, 3:5] = torch.tensor([5, 6])
    served.cm.generate(**again, **FIXED, **settings, adapter_names=["y", "x", None, "plain"])
    assert served.cm.recompiles == graphs


def test_generated_tokens_are_not_searched(llama) -> None:
    """As in PEFT: what begins is decided by the prompt."""
    inputs = inputs_of(2, 6)
    processed = {"logits_processor": [_Always(7)]}
    got = check_generated(llama, inputs, ["y", None], processed, processed)
    assert bool((got[:, 6:] == 7).all())


class _Always:
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = 0.0
        return forced


@pytest.mark.parametrize(
    "settings",
    # Prompts in chunks, quickly: test_alora_steps.
    [{"use_cache": False}, pytest.param({"prefill_chunk_size": 4}, marks=pytest.mark.slow)],
)
def test_however_generate_hands_over_the_tokens(llama, settings) -> None:
    """The whole sequence at every step, or the prompt in chunks. (PEFT counts from the end of what
    a forward gets, which then is something else.)"""
    inputs = inputs_of(3, 9)
    inputs["input_ids"][0, 6:8] = torch.tensor([5, 6])
    inputs["input_ids"][2, 3] = 7
    check_generated(llama, inputs, ["x", None, "y"], settings, {})


def test_beams_keep_their_request_s_beginning(llama) -> None:
    """PEFT refuses beams; its hooks do them where it is told where each beam's adapter begins."""
    inputs = inputs_of(3, 8)
    inputs["input_ids"][0, 4:6] = torch.tensor([5, 6])
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    fixed = {**beams, "pad_token_id": 0, "eos_token_id": None}
    got = llama.cm.generate(**inputs, **fixed, adapter_names=["x", "x", None])
    tuner = llama.peft.base_model
    llama.peft.set_adapter("x")
    for row, offset in enumerate((4, None, None)):
        with tuner._enable_peft_forward_hooks(alora_offsets=[offset] * 3):
            want = tuner.generate(**one(inputs, row), **fixed)
        assert torch.equal(got[2 * row : 2 * row + 2], want)


def test_the_default_adapter(llama) -> None:
    inputs = inputs_of(2, 7)
    inputs["input_ids"][:, 3] = 7
    want = llama.cm(**inputs, adapter_names=["y", "y"]).logits
    llama.cm.set_adapter("y")
    try:
        assert torch.equal(llama.cm(**inputs).logits, want)
    finally:
        llama.cm.set_adapter(None)


def test_a_cache_of_the_caller_s(llama) -> None:
    """Keys of the base serve an adapter that begins behind them. What cannot be known is asked."""
    ids = torch.randint(8, 61, (2, 8))
    ids[:, 5] = 7
    cache = DynamicCache(config=llama.base.config)
    llama.cm(input_ids=ids[:, :4], past_key_values=cache)
    got = llama.cm(input_ids=ids[:, 4:], past_key_values=cache, adapter_names=["y", None]).logits
    assert error(got[:1], llama.alone("y", input_ids=ids[:1])[:, 4:]) <= TOLERANCE
    assert error(got[1:], llama.alone(None, input_ids=ids[1:])[:, 4:]) <= TOLERANCE
    more = {"input_ids": ids[:, :1], "past_key_values": cache}
    with pytest.raises(BatchError, match=r"row 1 names 'y'.*generate\(\).*adapter_slots="):
        llama.cm(**more, adapter_names=[None, "y"])
    assert cache.get_seq_length() == 8
    slots = torch.tensor([[0], [-1]])
    got = llama.cm(**more, adapter_names=["y"], adapter_slots=slots).logits
    longer = torch.cat([ids, ids[:, :1]], 1)
    assert error(got[:1], llama.alone("y", input_ids=longer[:1])[:, -1:]) <= TOLERANCE


def test_slots_say_themselves_where_it_is_active(llama) -> None:
    inputs = inputs_of(2, 7)
    inputs["input_ids"][:, 2:4] = torch.tensor([5, 6])
    whole = torch.tensor([[0] * 7, [-1] * 7])
    got = llama.cm(**inputs, adapter_names=["x"], adapter_slots=whole).logits
    slots = whole[:, 0]  # one a request is a name
    placed = llama.cm(**inputs, adapter_names=["x"], adapter_slots=slots).logits
    assert error(placed[:1], llama.alone("x", **one(inputs, 0))) <= TOLERANCE
    assert error(placed[0], got[0]) > 100 * TOLERANCE
    assert error(got[1], placed[1]) <= TOLERANCE


@pytest.mark.slow
def test_more_adapters_than_slots_in_waves(llama) -> None:
    config = lorafx.LoraConfig(max_adapters=1, max_rank=4)
    cm = lorafx.compile(
        copy.deepcopy(llama.base),
        config,
        adapters=llama.folders,
        options={**REFERENCE, "overflow": "waves"},
    )
    mix = [*MIX, "plain"]  # no wave of one row, which would have a graph of its own
    inputs = inputs_of(len(mix), 9)
    begun(inputs)
    got = cm(**inputs, adapter_names=mix).logits
    for row, name in enumerate(mix):
        seen, own = inputs["attention_mask"][row].bool(), one(inputs, row)
        assert error(got[row][seen], llama.alone(name, **own)[0][seen]) <= TOLERANCE


# --- what is refused ---
def test_refused_by_name(llama, tmp_path) -> None:
    cm = llama.cm
    inputs = inputs_of(2, 6)
    embeds = llama.base.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(BatchError, match=r"'x' is an aLoRA adapter.*\[5, 6\].*input_ids"):
        cm(inputs_embeds=embeds, adapter_names=["x", None])
    with pytest.raises(BatchError, match=r"'x' is an aLoRA adapter.*generate\(\) has none"):
        cm.generate(inputs_embeds=embeds, max_new_tokens=2, adapter_names=["x", None])
    with pytest.raises(ConfigError, match=r"'x' is an aLoRA adapter.*part of no sum"):
        cm(**inputs, adapter_names=[{"x": 0.5}, None])
    with pytest.raises(ConfigError, match=r"'x' is an aLoRA adapter.*part of no sum"):
        cm(**inputs, adapter_names=[{"x": 1.0, "plain": 1.0}, None])
    for merge in (cm.merge, lambda name: cm.export_merged(name, tmp_path / "merged")):
        with pytest.raises(MatchError, match="'x' cannot be merged: it is an aLoRA adapter"):
            merge("x")
    cm.merge("plain")
    try:
        with pytest.raises(BatchError, match="merged"):
            cm(**inputs, adapter_names=["x", "plain"])
    finally:
        cm.unmerge()
    got = cm(**inputs, adapter_names=[None, None]).logits
    assert error(got[0], llama.alone(None, **one(inputs, 0))[0]) <= TOLERANCE


def test_a_row_without_the_tokens_is_said(llama) -> None:
    inputs = inputs_of(2, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        llama.cm(**inputs, adapter_names=["x", "plain"])
    said = [str(item.message) for item in caught if item.category is LorafxWarning]
    assert len(said) == 1
    assert "'x'" in said[0]
    assert "[5, 6]" in said[0]


def test_adapters_of_a_peft_model_are_taken_over(llama) -> None:
    """With what inspecting a folder says of it."""
    found = inspected(AdapterSource(llama.folders["x"]))
    assert "aLoRA: active from the tokens [5, 6] on" in found.features
    taken = take_over(copy.deepcopy(llama.peft))
    assert {name: state.config.invocation for name, state in taken.adapters.items()} == {
        "x": (5, 6),
        "y": (7,),
        "plain": (),
    }


@pytest.mark.slow
def test_attached_models(llama) -> None:
    model = lorafx.attach(copy.deepcopy(llama.base), llama.folders, options=REFERENCE)
    cm = lorafx.compile(copy.deepcopy(llama.base), llama.folders, options=REFERENCE)
    inputs = inputs_of(2, 6)
    for names in (["x", None], ["plain", "y"]):
        with lorafx.adapters(model, names), torch.no_grad():
            got = model(**inputs).logits
        assert error(got, cm(**inputs, adapter_names=names).logits) <= TOLERANCE


class Reads(nn.Module):
    """A method that takes other things than token ids; a head whose rows are no tokens."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(input_ids)).sum(1))

    def encode(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_other_methods_and_rows_that_are_no_tokens(tmp_path) -> None:
    torch.manual_seed(0)
    model = Reads().eval()
    folders = {
        name: oracle.save_adapter(
            model, tmp_path / name, rank=2, targets=[name], alora_invocation_tokens=[5]
        )
        for name in ("body", "head")
    }
    cm = lorafx.compile(model, folders, options=REFERENCE)
    ids = torch.tensor([[9, 5, 9], [9, 9, 5]])
    with pytest.raises(BatchError, match="'body' is an aLoRA adapter"):
        cm.encode(torch.randn(2, 8), adapter_names=["body", "body"])
    with pytest.raises(ProvenanceError, match="head"):
        cm(input_ids=ids, adapter_names=["head", None])
    cm(input_ids=ids, adapter_names=["body", None])


def test_behind_routed_experts_it_is_refused(tmp_path) -> None:
    """Dispatch sorts the tokens, and which is which is not proved behind it."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**sizes, **experts, num_key_value_heads=2, head_dim=10)
    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(config).eval()
    targets = [path for path, _ in base.named_modules() if path.endswith(("q_proj", "v_proj"))]
    plan = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [7]}
    folder = oracle.save_adapter(base, tmp_path / "y", rank=2, targets=targets, gain=4, **plan)
    cm = lorafx.compile(copy.deepcopy(base), {"y": folder}, options=REFERENCE, dynamic=False)
    ids = torch.randint(8, 61, (2, 6))
    ids[0, 3] = 7
    with pytest.raises(ProvenanceError, match=r"layers\.1\.self_attn\.q_proj"):
        cm(input_ids=ids, adapter_names=["y", None])
