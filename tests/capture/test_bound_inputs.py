"""Banks and packed weights are looked up when a graph is captured, not in every call."""

from __future__ import annotations

import pytest
import torch
from dense_merge import TOLERANCE, Case, case_by_patterns, error, random_base
from tiny_models import Family
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import lorafx
from lorafx.errors import ReplacedModuleError

pytestmark = pytest.mark.usefixtures("fixed_sizes")

NAMES = ["a", None, "b", "a"]


class Block(nn.Module):
    """Two linears that share x, so that their weights are packed, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.out(self.left(x) * self.right(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer(x)
        return {"logits": x}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Adapter a touches every layer, b the first one alone."""
    folder = tmp_path_factory.mktemp("bound")
    base = random_base(Family(Stack, ()))
    targets = {"a": r"layers\.\d\..*", "b": r"layers\.0\..*"}
    return case_by_patterns(base, folder, targets)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"x": torch.randn(len(NAMES), 8)}


def check(cm: nn.Module, case: Case, names: list[str | None] = NAMES) -> None:
    got = cm(**inputs(), adapter_names=names)["logits"]
    assert error(got, case.expected(names, inputs())) <= TOLERANCE


def names_in_code(cm: lorafx.CompiledModel) -> list[set[str]]:
    """Of each graph of the model's forward, the newest first, the names that Dynamo's bytecode
    reads."""
    code = cm.entry(cm.model).traced[(0, 0), False]._code
    return [set(entry.code.co_names) for entry in _debug_get_cache_entry_list(code)]


def test_no_call_loads_them(case: Case) -> None:
    cm = case.compile()
    check(cm, case)
    (names,) = names_in_code(cm)
    assert "_parameters" in names  # the weights
    assert not {"bank", "A", "B", "ranks", "scales"} & names


def test_layers_that_change_places_unseen(case: Case) -> None:
    """torch reports no writes to `_modules`, and no guard of Dynamo tells equal layers apart."""
    cm = case.compile()
    check(cm, case)
    held = cm.model.layers._modules
    held["1"], held["2"] = held["2"], held["1"]
    with pytest.raises(ReplacedModuleError, match=r"layers\.1, a Block, was replaced"):
        cm(**inputs(), adapter_names=NAMES)
    changed = case.model()
    changed.layers[1], changed.layers[2] = changed.layers[2], changed.layers[1]
    check(cm, Case(changed, case.folders), ["b", None, None, "b"])
    held["1"], held["2"] = held["2"], held["1"]
    check(cm, case)
