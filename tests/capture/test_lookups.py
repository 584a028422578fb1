"""Indices of a call that are outside of the table that they point into: refused by name before the
graph runs. Generated code checks them on all threads of a CPU at once, where an error ends the
process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attached import attached, compiled, fresh_dynamo, served
from dense_merge import Case
from tiny_models import VOCAB, token_inputs
from torch import nn
from torch.nn import functional
from transformers import StaticCache

import lorafx
from lorafx import OutOfRangeError
from lorafx.capture.lookup_search import LookupSearch
from lorafx.program.frame import Frame, FrameInput

__all__ = ["fresh_dynamo"]


def ids(rows: int = 3, length: int = 4, **wrong: int) -> torch.Tensor:
    tokens = torch.ones(rows, length, dtype=torch.int64)
    for place, token in wrong.items():
        tokens.view(-1)[int(place[1:])] = token
    return tokens


@pytest.mark.parametrize("names", [None, ["a1", None, "a3"]])
def test_token_ids(case_of: Callable[..., Case], names: Any) -> None:
    cm = case_of("gpt2").compile()
    good = cm(input_ids=ids(), adapter_names=names).logits
    said = rf"input_ids\[1, 2\] is {VOCAB}, but transformer.wte.weight has {VOCAB} entries: 0 to"
    for _ in range(2):
        with pytest.raises(OutOfRangeError, match=said):
            cm(input_ids=ids(_6=VOCAB), adapter_names=names)
    with pytest.raises(IndexError, match=r"\[0, 3\] is -1, .* 2 of 12 are outside"):
        cm(input_ids=ids(_3=-1, _5=-100), adapter_names=names)
    graphs = cm.recompiles
    assert torch.equal(cm(input_ids=ids(), adapter_names=names).logits, good)
    assert cm.recompiles == graphs


def test_positions(case_of: Callable[..., Case]) -> None:
    cm = case_of("gpt2").compile()
    positions = torch.arange(4)[None] + 61
    with pytest.raises(OutOfRangeError, match=r"position_ids\[0, 3\] is 64, but .*wpe.weight has"):
        cm(input_ids=ids(), position_ids=positions)
    with pytest.raises(OutOfRangeError, match=r"\[64\] .* the sizes of this call is 64, but .*wpe"):
        cm(input_ids=ids(3, 70))


def test_kinds_of_tokens(case_of: Callable[..., Case]) -> None:
    cm = case_of("bert").compile()
    with pytest.raises(OutOfRangeError, match=r"token_type_ids\[0, 1\] is 2, .* 2 entries"):
        cm(input_ids=ids(), token_type_ids=ids(_1=2))


def test_labels(case_of: Callable[..., Case]) -> None:
    cm = case_of("bert").compile()
    assert torch.isfinite(cm(input_ids=ids(), labels=ids(_1=-100)).loss)
    with pytest.raises(OutOfRangeError, match=rf"labels\[1, 1\] is {VOCAB}, but"):
        cm(input_ids=ids(), labels=ids(_1=-100, _5=VOCAB))


def test_places_behind_a_static_cache(shallow: Case) -> None:
    cm = shallow.compile()
    cache = StaticCache(config=cm.config, max_cache_len=6)
    cm(input_ids=ids(), past_key_values=cache)
    with pytest.raises(OutOfRangeError, match="past_key_values is 6, but past_key_values has 6"):
        cm(input_ids=ids(), past_key_values=cache)


@pytest.mark.parametrize("lowering", ["inductor"])
def test_the_process_lives(shallow: Case, lowering: str) -> None:
    """So many rows that generated code uses all threads: it ended the process."""
    cm = shallow.compile({"lowering": lowering})
    wrong = ids(300, 7)
    wrong[200:] = VOCAB + 5
    for names in (None, ["a0", *[None] * 299]):
        assert cm(input_ids=ids(300, 7), adapter_names=names).logits.isfinite().all()
        with pytest.raises(OutOfRangeError, match=r"input_ids\[200, 0\]"):
            cm(input_ids=wrong, adapter_names=names)


def test_models_that_users_compile(shallow: Case) -> None:
    model = attached(shallow)
    call = compiled(model)
    inputs = token_inputs(3, 4)
    served(call, model, ["a0", None, "a1"], inputs)
    inputs["input_ids"][2, 1] = VOCAB
    with pytest.raises(OutOfRangeError, match=r"\[2, 1\] is"):
        served(call, model, ["a0", None, "a1"], inputs)
    with pytest.raises(OutOfRangeError, match=r"\[2, 1\] is"), torch.no_grad():
        call(**inputs)


def test_saved_graphs(shallow: Case, tmp_path: Path) -> None:
    cache, model = tmp_path / "graphs", shallow.model()
    cache.mkdir(mode=0o700)
    options = {"lowering": "reference", "cache": str(cache), "base_graphs": True}
    call: dict[str, Any] = {"adapter_names": ["a0", None, "a1"], "attention_mask": ids()}
    lorafx.compile(model, shallow.folders, options=options)(input_ids=ids(), **call)
    torch._dynamo.reset()
    cm = lorafx.compile(shallow.model(), shallow.folders, options=options)
    cm(input_ids=ids(), **call)
    assert [record.saved for record in cm._session.backend.records] == ["loaded from the folder"]
    with pytest.raises(OutOfRangeError, match=r"input_ids\[0, 0\]"):
        cm(input_ids=ids(_0=VOCAB), **call)


class Pointing(nn.Module):
    """Indices of every kind, of which some are the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.out = nn.Embedding(8, 4), nn.Linear(4, 4)
        self.register_buffer("order", torch.tensor([1, 0]))

    def forward(self, ids: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
        h = self.out(self.tokens(ids + 1))
        best = h.argmax(-1)
        rows = torch.arange(h.shape[0])
        return (
            h[rows, picks]
            + self.tokens.weight[best][:, 0]
            + h[:, :2].index_select(1, self.order)[:, 0]
        )


def looked_up(model: nn.Module, *inputs: torch.Tensor) -> Any:
    found = []

    def backend(gm: torch.fx.GraphModule, examples: Any) -> Any:
        nodes = gm.graph.find_nodes(op="placeholder")
        kinds = [
            FrameInput(kind_of(example), node.name)
            for node, example in zip(nodes, examples, strict=True)
        ]
        found.append(LookupSearch(gm.graph, Frame(kinds)).lookups)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=True)(*inputs)
    return found[0]


def kind_of(example: Any) -> Any:
    if not isinstance(example, torch.Tensor):
        return "symbol"
    return "argument" if example.dtype == torch.int64 and example.shape != (2,) else "state"


def test_what_a_graph_is_asked_for() -> None:
    """The arithmetic of the caller's own indices is done, none of the model's."""
    found = looked_up(
        Pointing(), torch.ones(5, 3, dtype=torch.int64), torch.ones(5, dtype=torch.int64)
    )
    tables = [item.table for item in found.items if hasattr(item, "table")]
    assert len(tables) == 3
    assert "tokens" in tables[0]
    assert pickle.loads(pickle.dumps(found)) == found


def by_method(ids: torch.Tensor) -> None:
    ids.view(-1).add_(1)


def by_function(ids: torch.Tensor) -> None:
    torch.clamp_(ids, 0, 3)


def by_out(ids: torch.Tensor) -> None:
    torch.clamp(ids, 0, 3, out=ids)


def by_schema(ids: torch.Tensor) -> None:
    torch.ops.aten.clamp_.default(ids, 0, 3)


class Mapped(nn.Module):
    """Looks up under `torch.vmap`, whose values exist at its level alone."""

    def forward(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: functional.embedding(row, table))(ids)


def test_an_index_under_vmap_is_left_to_generated_code() -> None:
    inputs = torch.zeros(5, 3, dtype=torch.int64), torch.ones(4, 4)
    assert not looked_up(Mapped(), *inputs).items


class Shifted(nn.Module):
    """As sequence to sequence models make their decoder's tokens of labels."""

    def forward(self, labels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        shifted = labels.new_zeros(labels.shape)
        shifted[:, 1:] = labels[:, :-1].clone()
        shifted.masked_fill_(shifted == -100, 0)
        return functional.embedding(shifted, table).sum() + functional.cross_entropy(
            table[0].expand(labels.numel(), 4), labels.view(-1)
        )


def test_labels_of_which_tokens_are_made() -> None:
    found = looked_up(Shifted(), torch.zeros(5, 3, dtype=torch.int64), torch.ones(4, 4))
    assert [item.name for item in found.items if hasattr(item, "table")] == ["l_labels_{}"]


class Placed(nn.Module):
    """Places that may count from the end, in functions that take such and in one that does not."""

    def forward(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        filled = table.index_fill(1, ids[0], 0.0)
        put = torch.index_put(table, (ids[1],), table[:3])
        return filled + put.index_select(0, ids[2]).sum()


def test_places_that_count_from_the_end() -> None:
    found = looked_up(Placed(), torch.zeros(5, 3, dtype=torch.int64), torch.ones(4, 4))
    assert [item.negative for item in found.items if hasattr(item, "table")] == [True, True, False]


class InPlace(nn.Module):
    def __init__(self, write: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.write = write

    def forward(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        self.write(ids)
        return functional.embedding(ids, table)


@pytest.mark.parametrize("write", [by_method, by_function, by_out, by_schema])
def test_an_index_that_the_graph_writes_is_left_to_generated_code(write: Any) -> None:
    inputs = torch.zeros(5, 3, dtype=torch.int64), torch.ones(4, 4)
    assert not looked_up(InPlace(write), *inputs).items
