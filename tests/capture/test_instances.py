"""A graph of several requests serves one, too, where a capture for one is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import Case, check_mixed
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import lorafx
from lorafx.program.frame import fake_value

K = 6
MIX = ["a", None, "b"]


class Net(nn.Module):
    """Mixes the tokens of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, 2 * K), nn.Linear(2 * K, K)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.up(x)).view(x.shape[0], -1, 2, K).transpose(1, 2)
        h = torch.softmax(h @ h.transpose(-1, -2), -1) @ h
        return {"logits": x + self.down(h.transpose(1, 2).reshape(x.shape[0], -1, 2 * K))}


class Alone(Net):
    """Computes something else for one request."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)
        return {"logits": 2 * found["logits"]} if x.shape[0] == 1 else found


def batch(rows: int, tokens: int = 4) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, tokens, K)}


def frames() -> int:
    return counters["frames"]["ok"]


def test_one_request(small) -> None:
    torch.manual_seed(0)
    case: Case = small(Net, ["up", "down"])
    cm = case.compile(options={"base_graphs": False})
    check_mixed(cm, case, MIX, batch(3))
    for name in ("a", None, "b"):
        check_mixed(cm, case, [name], batch(1))
        seen = frames()
    check_mixed(cm, case, ["b"], batch(1, 7))
    check_mixed(cm, case, MIX, batch(3, 2))
    assert (cm.recompiles, frames()) == (1, seen)


def test_labels_of_one_request(shallow: Case) -> None:
    """Whether they are the token ids themselves, as in `labels=ids`, or others."""
    cm = shallow.compile(options={"lowering": "reference"})
    ids = torch.randint(0, 50, (3, 6))
    for rows, names in ((ids, ["a0", None, "a1"]), (ids[:1], ["a0"])):
        for labels in (rows, rows.clone()):
            found = cm(input_ids=rows, labels=labels, adapter_names=names)
            logits, wanted = found.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
            torch.testing.assert_close(found.loss, nn.functional.cross_entropy(logits, wanted))
    assert cm.recompiles == 1


def test_what_is_another_computation(small) -> None:
    torch.manual_seed(0)
    case: Case = small(Alone, ["up", "down"])
    cm = case.compile()
    cm(**batch(3), adapter_names=MIX)
    check_mixed(cm, case, ["a"], batch(1))
    assert cm.recompiles == 2


@pytest.mark.parametrize(("least", "graphs"), [(2, 1), (3, 2)])
def test_what_is_found_out_while_a_graph_is_compiled(small, least: int, graphs: int) -> None:
    """A pass decides something by the number of requests, which is guarded."""

    def run(gm: fx.GraphModule, ctx: Any) -> int:
        values = [fake_value(node) for node in gm.graph.find_nodes(op="placeholder")]
        sizes = [value.shape[0] for value in values if isinstance(value, Tensor)]
        assert all(size >= least for size in sizes if isinstance(size, torch.SymInt))
        asked.append(sizes)
        return 0

    torch.manual_seed(0)
    asked: list[Any] = []
    case: Case = small(Net, ["up", "down"])
    cm = case.compile(options={"passes": {"ask": lorafx.After("captured", run)}})
    check_mixed(cm, case, MIX, batch(3))
    check_mixed(cm, case, ["a"], batch(1))
    assert cm.recompiles == len(asked) == graphs
