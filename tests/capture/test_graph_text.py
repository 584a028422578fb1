"""A stage as a program; its nodes are named by what they are, and what is compiled keeps its own
names."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case, save_adapter
from expecttest import assert_expected_inline
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lorafx
from lorafx.capture.graph_text import stage_lines
from lorafx.capture.record import Stage
from lorafx.inspection.viewer.dump import legend

pytestmark = pytest.mark.any_sizes

aten = torch.ops.aten


def graph() -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    built, mode = fx.Graph(), FakeTensorMode()
    nodes: dict[str, fx.Node] = {}

    def add(name: str, node: fx.Node, *sizes: int) -> Any:
        with mode:
            node.meta["val"] = torch.empty(sizes, dtype=torch.bfloat16)
        nodes[name] = node
        return node

    x = add("x", built.placeholder("x"), 4, 6)
    w = add("w", built.get_attr("weight"), 8, 6)
    right = add("right", built.call_function(aten.permute.default, (w, [1, 0])), 6, 8)
    y = add("y", built.call_function(aten.mm.default, (x, right)), 4, 8)
    y.meta["stack_trace"] = (
        '  File "model.py", line 3, in forward\n    return self.up(x)\n    ^^^^^^^\n'
    )
    y.meta["nn_module_stack"] = {"1": ("L['self']._modules['up']", nn.Linear)}
    halves = built.call_function(aten.split.Tensor, (y, 4), {"dim": -1})
    left = add("left", built.call_function(operator.getitem, (halves, 0)), 4, 4)
    built.output((left, {"rest": (y,)}))
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(8, 6))
    return fx.GraphModule(root, built), nodes


@pytest.mark.quick
def test_a_graph_reads_like_a_program() -> None:
    gm, _ = graph()
    assert_expected_inline(
        "\n".join(stage_lines(Stage(gm), {("", "mm_default"): "up_mm"})),
        """\
class GraphModule(torch.nn.Module):
    def forward(
        self,
        x: "bfloat16[4, 6]",
    ):
        weight: "bfloat16[8, 6]" = self.weight
        permute_default: "bfloat16[6, 8]" = torch.ops.aten.permute.default(weight, [1, 0])
        # up (model.py:3): return self.up(x)
        up_mm: "bfloat16[4, 8]" = torch.ops.aten.mm.default(x, permute_default)
        split_tensor = torch.ops.aten.split.Tensor(up_mm, 4, dim = -1)
        getitem: "bfloat16[4, 4]" = split_tensor[0]
        return (getitem, {'rest': (up_mm,)})""",
    )


@pytest.mark.quick
def test_the_legend_explains_the_sizes_that_are_shown() -> None:
    shown = legend(["y = torch.ops.lorafx.run_delta_.default(x: s1)"], {"s1": "a", "s2": "b"}, ())
    assert "# s1: a" in shown
    assert "# s2: b" not in shown


EXPECTED = (
    "embed_lora:",
    "down_fused:",
    "up_gate_packed:",
    "up_gate_packed_1:",  # the branch that is called twice
    "up_out:",
    "up_gate_head_packed_weight:",
    "down_bank_A:",
    "slots:",
    'requests: "Sym(',
    "# up (tiny_models.py:",
    ": requests of the batch: dimension 0 of ids",
)


def test_dumps_are_readable(looked: Any, tmp_path: Path) -> None:
    found = looked("plain")
    cm = found.case.compile({"dump": str(tmp_path)})
    cm(**found.inputs, adapter_names=["a1", None, "a0", "a3"])
    folder = tmp_path / "graph-0-lora"
    graph = (folder / "16-pack.py").read_text()
    for text in EXPECTED:
        assert text in graph, text
    assert "_lora:" in (folder / "04-captured.py").read_text()
    assert "_fused:" in (folder / "15-fuse.py").read_text()
    assert "marks.py" not in graph


def test_generated_code_is_beside_the_graphs(tmp_path: Path, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6)).eval().requires_grad_(False)
    folder = save_adapter(base, tmp_path / "a", rank=2, targets=["0"], seed=1)
    monkeypatch.setenv("LORAFX_DUMP", str(tmp_path / "dump"))
    cm = lorafx.compile(base, {"a": folder}, options={"lowering": "inductor", "base_graphs": True})
    x = torch.randn(3, 8)
    cm(x, adapter_names=["a", None, "a"])
    cm(x)
    graph = tmp_path / "dump" / "graph-0-lora"
    kernels = [path.read_text() for path in graph.glob("kernel-*.cpp")]
    assert len(kernels) == 1
    assert "lorafx_kernel" in kernels[0]
    for name in ("graph-0-lora", "graph-1-base"):
        assert "def call(" in (graph.parent / name / "inductor.py").read_text()
    assert "module_0_fused" in (graph / "16-pack.py").read_text()
    assert "graphs: 2" in (graph.parent / "explain.txt").read_text()
    assert cm.dump(tmp_path / "again")

    def text(path: Path) -> list[str]:
        return path.read_text().splitlines()[path.name[0].isdecimal() :]  # without times

    for path in graph.iterdir():  # what is written as graphs come is what is written afterwards
        assert text(tmp_path / "again" / "graph-0-lora" / path.name) == text(path)


def test_models_do_not_dump_over_one_another(small: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LORAFX_DUMP", str(tmp_path / "dump"))

    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x)

    case: Case = small(Up, ["up"])
    compiled = [case.compile(dynamic=False) for _ in range(2)]
    for cm, names in zip(compiled, (["a", None], ["a", "b"]), strict=True):
        cm(torch.randn(2, 4), adapter_names=names)
    first, second = tmp_path / "dump", tmp_path / "dump" / "Up-2"
    for folder in (first, second):
        assert "graphs: 1" in (folder / "explain.txt").read_text()
        assert (folder / "graph-0-lora" / "22-outline.py").exists()
    compiled[0].detach()
    again = case.compile(dynamic=False)
    again(torch.randn(2, 4), adapter_names=["b", None])
    assert sorted(path.name for path in first.iterdir() if path.is_dir()) == [
        "Up-2",
        "graph-0-lora",
    ]
    assert "b: rank 3, 1 sites, slot" in (first / "explain.txt").read_text()
