"""`adapter_slots`: an adapter for each token, against W + ΔW applied token by token."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from token_adapters import VOCABULARY, Served, bert, inputs_of, llama, opt, token_hook
from torch import Tensor, nn
from torch._dynamo import convert_frame
from transformers import DynamicCache, StaticCache

import lorafx

pytestmark = pytest.mark.any_sizes


OTHERS = [pytest.param(build, marks=pytest.mark.slow) for build in (opt, bert)]


@pytest.fixture(scope="module", params=[llama, *OTHERS], ids=["llama", "opt", "bert"])
def served(request, tmp_path_factory) -> Served:
    return Served(request.param, tmp_path_factory.mktemp("adapters"))


ONE_FAMILY = pytest.mark.parametrize("served", [llama, *OTHERS], indirect=True)


def test_each_token_gets_its_own_adapter(served: Served) -> None:
    for rows, length in ((1, 7), (1, 9), (3, 6), (4, 8), (6, 6)):
        inputs = inputs_of(rows, length)
        slots = torch.randint(-1, 2, (rows, length))
        slots[0, :2] = torch.tensor([0, 1])  # never one adapter a request
        got = served.cm(**inputs, adapter_slots=slots)[0]
        torch.testing.assert_close(got, served.oracle(slots, **inputs), rtol=1e-5, atol=1e-5)
    before = served.cm.recompiles
    served.cm(**inputs_of(5, 7), adapter_slots=torch.tensor([[0, 1, -1, 1, 0, 0, 1]] * 5))
    assert served.cm.recompiles == before


def test_graphs_for_one_size(tmp_path: Path) -> None:
    """Of as many tokens as there are heads, or features of a head."""
    static = Served(llama, tmp_path, dynamic=False)
    for rows, length in ((4, 4), (2, 8)):
        slots = torch.tensor([[0, 1, -1, 1] * (length // 4)] * rows)
        inputs = inputs_of(rows, length)
        got = static.cm(**inputs, adapter_slots=slots)[0]
        torch.testing.assert_close(got, static.oracle(slots, **inputs), rtol=1e-5, atol=1e-5)


@ONE_FAMILY
def test_slots_of_one_adapter_a_request_are_adapter_names(served: Served) -> None:
    inputs = inputs_of(3, 5)
    by_name = served.cm(**inputs, adapter_names=["a1", None, "a0"])[0]
    for slots in (torch.tensor([1, -1, 0]), torch.tensor([[1] * 5, [-1] * 5, [0] * 5])):
        got = served.cm(**inputs, adapter_slots=slots)[0]
        torch.testing.assert_close(got, by_name, rtol=1e-5, atol=1e-5)


def test_slots_index_the_names_that_are_given(served: Served) -> None:
    inputs = inputs_of(2, 4)
    slots = torch.tensor([[0, 1, 1, -1], [1, 1, 0, 0]])
    got = served.cm(**inputs, adapter_slots=slots, adapter_names=["a1", "a0"])[0]
    swapped = torch.where(slots < 0, slots, 1 - slots)
    torch.testing.assert_close(got, served.oracle(swapped, **inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.tensor([[0, 1, 2, 0], [0, 0, 0, 0]]), "there are 2 adapters"),
        (torch.tensor([[0, 1, -2, 0], [0, 0, 0, 0]]), "holds -2 to 1"),
        (torch.zeros(2, 4), r"integers of shape \(B,\) or \(B, T\)"),
        ([0, 1], "adapter_slots must be a tensor of integers"),
        (torch.tensor([[0, 1, 1], [0, 0, 1]]), r"adapter_slots has shape \(2, 3\)"),
        (torch.tensor([[0, 1, 1, 0]]), "should hold the 1 requests"),
        (torch.tensor([0, 1, 1]), "3 entries, but the batch has 2 rows"),
    ],
)
def test_slots_that_do_not_fit_are_refused(served: Served, slots: Tensor, message: str) -> None:
    with pytest.raises(lorafx.BatchError, match=message):
        served.cm(**inputs_of(2, 4), adapter_slots=slots)


class Pooled(nn.Module):
    """The head's rows are requests, not tokens; the second body sees the tokens reversed."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.body = nn.Linear(8, 8)
        self.reversed = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.body(self.embed(input_ids))
        return self.head(self.reversed(x.flip(1)).sum(1))


@pytest.mark.parametrize("target", ["head", "reversed"])
def test_rows_that_are_not_the_tokens_in_order_are_refused(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Pooled().eval()
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=[target]))
    peft_model.save_pretrained(tmp_path / "a")
    cm = lorafx.compile(model, {"a": tmp_path / "a"}, options={"lowering": "reference"})
    with pytest.raises(lorafx.ProvenanceError, match=target):
        cm(
            input_ids=torch.randint(0, VOCABULARY, (2, 4)),
            adapter_slots=torch.tensor([[0, 0, -1, 0], [0, 0, 0, 0]]),
        )


class Halves(nn.Module):
    """Two linears in graphs of their own; between them tokens may change places."""

    main_input_name = "input_ids"

    def __init__(self, *, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.first(self.embed(input_ids))
        torch._dynamo.graph_break()
        return self.second(x.flip(1) if self.turned else x)


class Functional(nn.Module):
    """Nothing calls the linear: its weight is found in the graph."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        return nn.functional.linear(self.embed(input_ids), self.first.weight)


@torch.no_grad()
def test_a_weight_that_no_module_multiplies_by(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Functional().eval(), torch.randint(0, VOCABULARY, (2, 4))
    path, delta = _saved(model, tmp_path / "first", "first")
    cm = lorafx.compile(model, {"a": path}, options={"lowering": "reference"})
    weights = torch.rand(2, 4)
    added, used = model.embed(ids) @ delta.T, (SLOTS == 0).float()
    for settings, mix in (
        ({"adapter_slots": SLOTS}, used),
        ({"adapter_gates": (SLOTS[..., None], weights[..., None])}, used * weights),
    ):
        want = nn.functional.linear(model.embed(ids), model.first.weight) + added * mix[..., None]
        got = cm(input_ids=ids, **settings)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


SLOTS = torch.tensor([[0, -1, -1, 0], [-1, 0, 0, 0]])


def _saved(model: nn.Module, folder: Path, target: str) -> tuple[str, Tensor]:
    """An adapter of one linear, and its delta."""
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=[target]))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    peft_model.save_pretrained(folder)
    merged = peft_model.merge_and_unload().get_submodule(target).weight
    return str(folder), (merged - model.get_submodule(target).weight).detach()


@pytest.mark.parametrize("turned", [False, True])
def test_behind_a_graph_break_a_token_is_nobodys(turned: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Halves(turned=turned).eval(), torch.randint(0, VOCABULARY, (2, 4))
    path, delta = _saved(model, tmp_path / "first", "first")
    cm = lorafx.compile(model, {"a": path}, options={"lowering": "reference"})
    oracle = copy.deepcopy(model)
    oracle.first.register_forward_hook(token_hook([delta], (SLOTS[..., None] == 0).float()))
    with torch.no_grad():
        want = oracle(ids)
    torch.testing.assert_close(cm(input_ids=ids, adapter_slots=SLOTS), want, rtol=1e-5, atol=1e-5)

    model = Halves(turned=turned).eval()
    path, _ = _saved(model, tmp_path / "second", "second")
    cm = lorafx.compile(model, {"a": path}, options={"lowering": "reference"})
    with pytest.raises(lorafx.ProvenanceError, match="second"):
        cm(input_ids=ids, adapter_slots=SLOTS)


@ONE_FAMILY
def test_frames_of_others_between_dynamo_and_the_backend(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Profilers stand there. A graph is then not known to begin with the call's arguments."""
    original = convert_frame.compile_frame

    def compile_frame(*args: object, **kwargs: object) -> object:
        return original(*args, **kwargs)

    monkeypatch.setattr(convert_frame, "compile_frame", compile_frame)
    torch._dynamo.reset()
    inputs, slots = inputs_of(3, 6), torch.randint(-1, 2, (3, 6))
    slots[0, :2] = torch.tensor([0, 1])
    got = served.cm(**inputs, adapter_slots=slots)[0]
    torch.testing.assert_close(got, served.oracle(slots, **inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "rows"),
    [(DynamicCache, 1), (DynamicCache, 3), (StaticCache, 3)],
)
def test_tokens_behind_a_cache(tmp_path: Path, cache: type, rows: int) -> None:
    """A sequence that comes in chunks gets what it gets as a whole: each token its own adapter."""
    served = Served(llama, tmp_path)
    ids = torch.randint(0, VOCABULARY, (rows, 9))
    slots = torch.randint(-1, 2, (rows, 9))
    slots[0, :2] = slots[0, 4:6] = torch.tensor([0, 1])
    want = served.oracle(slots, input_ids=ids)
    config = served.base.config
    past = cache(config=config) if cache is DynamicCache else cache(config, max_cache_len=16)
    for start, end in ((0, 4), (4, 7), (7, 8), (8, 9)):
        got = served.cm(
            input_ids=ids[:, start:end],
            attention_mask=torch.ones_like(ids[:, :end]),
            past_key_values=past,
            adapter_slots=slots[:, start:end],
        )
        torch.testing.assert_close(got[0], want[:, start:end], rtol=1e-5, atol=1e-5)
    with pytest.raises(lorafx.BatchError, match="Tokens that are in a cache already have none"):
        served.cm(
            input_ids=ids[:, :1],
            attention_mask=torch.ones(rows, 10),
            past_key_values=past,
            adapter_slots=torch.tensor([[0, 1]] * rows),
        )
