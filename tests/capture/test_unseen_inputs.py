"""Inputs that AOTAutograd does not see are inputs of the graph as ever."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case, check_mixed
from hand_made import hand_case
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import get_static_input_idxs

import lorafx
from lorafx.capture import backend
from lorafx.capture.lowering import ReferenceLowering
from lorafx.capture.stamps import Folded
from lorafx.capture.unseen_inputs import Order, UnseenInputs, around
from lorafx.graph.context import Context
from lorafx.model.module_graph import storage_key

pytestmark = pytest.mark.quick

H, LAYERS = 8, 3
NAMES = ["a0", None, "a1"]
#: What the layers alone take.
OWN = {f"layers.{index}.{name}" for index in range(LAYERS) for name in ("up", "down", "scale")}
OWN |= {"bank", "slots"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(H, 2 * H, bias=False)
        self.down = nn.Linear(2 * H, H, bias=False)
        self.scale = nn.Parameter(torch.randn(H))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(self.up(h).sin().reshape(*h.shape[:-1], 2 * H)).cos() * self.scale


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(H))
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x * self.first
        for layer in self.layers:
            x = layer(x)
        return {"logits": x}


class Reading(Stack):
    """Reads what is a layer's."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(x + self.layers[1].scale)


class OneTable(Stack):
    """What the layers scale by lies in one tensor, in copies of the model too."""

    def __init__(self) -> None:
        super().__init__()
        self.lay_out(torch.randn(LAYERS + 1, H))

    def lay_out(self, table: Tensor) -> None:
        for layer, scale in zip(self.layers, table, strict=False):
            layer.scale = nn.Parameter(scale, requires_grad=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = type(self)()
        copied.load_state_dict(self.state_dict())
        return copied.eval().requires_grad_(False)


class OneTableForAll(OneTable):
    def lay_out(self, table: Tensor) -> None:
        super().lay_out(table)
        self.first = nn.Parameter(table[-1], requires_grad=False)


class Seen:
    """Of each graph: the names of its inputs, those that were left out, which inputs Inductor
    would be told to be fixed, and how many inputs share each memory."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []
        self.left_out: list[list[int]] = []
        self.fixed: list[list[int]] = []
        self.memory: list[list[int]] = []

    def unseen(self) -> set[str]:
        return {self.names[-1][position] for position in self.left_out[-1]}

    def look(self, gm: fx.GraphModule, ctx: Context) -> int:
        inputs = gm.graph.find_nodes(op="placeholder")
        self.names.append([_name(ctx, node) for node in inputs])
        keys = [storage_key(v) if isinstance(v := n.meta["val"], Tensor) else None for n in inputs]
        self.memory.append([keys.index(key) for key in keys])
        return 0


def _name(ctx: Context, node: fx.Node) -> str:
    item = ctx.frame.by_node[node]
    if item.kind == "weight":
        return item.sites[0].path
    return item.kind if item.kind in ("bank", "slots") else _path(item.label)


def _path(label: str) -> str:
    """`layers.0.scale`, of the expression by which Dynamo reaches it."""
    found = re.fullmatch(r".*\['layers'\].*\['(\d)'\].*\['scale'\]", label)
    return f"layers.{found[1]}.scale" if found else label


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found, leave_out, lowered = Seen(), backend.leave_out, ReferenceLowering.compile

    def noting(folded: Folded) -> UnseenInputs | None:
        left = leave_out(folded)
        found.left_out.append([] if left is None else list(left.order.unseen))
        return left

    def compiling(self: Any, gm: fx.GraphModule, inputs: Any) -> Any:
        found.fixed.append(sorted(get_static_input_idxs(0)))
        values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
        assert [value.shape for value in values] == [value.shape for value in inputs]
        return lowered(self, gm, inputs)

    monkeypatch.setattr(backend, "leave_out", noting)
    monkeypatch.setattr(ReferenceLowering, "compile", compiling)
    return found


def run(base: nn.Module, folder: Path, seen: Seen) -> None:
    """Right results, by the same graph with stamps as without."""
    base = base.eval().requires_grad_(False)
    paths = [f"layers.{index}.{name}" for index in range(LAYERS) for name in ("up", "down")]
    case: Case = hand_case(base, folder, a0=paths, a1=paths[1:])
    inputs = {"x": torch.randn(3, 5, H)}
    for stamps in (False, True):
        torch._dynamo.reset()
        passes = {"look": lorafx.After("captured", seen.look)}
        cm: Any = case.compile({"stamps": stamps, "passes": passes}, dynamic=False)
        check_mixed(cm, case, NAMES, inputs)
    assert seen.names[0] == seen.names[1]
    assert seen.fixed[0] == seen.fixed[1]
    assert seen.memory[0] == seen.memory[1]


def test_what_stamps_alone_take_is_left_out(tmp_path: Path, seen: Seen) -> None:
    torch.manual_seed(0)
    run(Stack(), tmp_path, seen)
    assert seen.unseen() == OWN
    assert seen.fixed[0]


def test_a_weight_that_something_else_reads_is_not(tmp_path: Path, seen: Seen) -> None:
    torch.manual_seed(0)
    run(Reading(), tmp_path, seen)
    assert seen.unseen() == OWN - {"layers.1.scale"}


def test_weights_in_one_memory_are_left_out_together(tmp_path: Path, seen: Seen) -> None:
    torch.manual_seed(0)
    run(OneTable(), tmp_path, seen)
    assert seen.unseen() == OWN
    assert seen.memory[1] != list(range(len(seen.memory[1])))


def test_weights_in_the_memory_of_another_are_not(tmp_path: Path, seen: Seen) -> None:
    torch.manual_seed(0)
    run(OneTableForAll(), tmp_path, seen)
    assert seen.unseen() == {path for path in OWN if "scale" not in path}


@pytest.mark.parametrize(
    ("seen", "unseen"), [((0,), (1,)), ((1, 3), (0, 2)), ((), (0, 1)), ((2,), (0, 1))]
)
def test_arguments_go_to_their_places(seen: tuple[int, ...], unseen: tuple[int, ...]) -> None:
    calls: list[list[Any]] = []
    inner, outer = around(Order(seen, unseen), calls.append)
    run = outer(lambda *arguments: inner(list(arguments)))
    arguments = [object() for _ in (*seen, *unseen)]
    run(*arguments)
    assert calls == [arguments]
