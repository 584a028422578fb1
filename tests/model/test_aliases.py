"""One module instance reached by several attribute paths is one site with one bank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error
from hand_made import factors, hand_case, merged, save
from tiny import randomise
from tiny_models import token_inputs
from torch import Tensor, nn

import lorafx
from lorafx import layers
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError
from lorafx.model.module_graph import MAX_PATHS, ModuleGraph
from lorafx.runtime.marking import build_sites

K = 6
NAMES = ["a", None, "b", "a"]
EXPERTS = 5


class Block(nn.Module):
    """A gate, also at experts.runner.gate: what serving engines do."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = layers.ReplicatedLinear(24, EXPERTS, bias=False)
        self.experts = layers.FusedMoE(EXPERTS, 2, 24, 12)
        self.experts.runner = nn.Module()
        self.experts.runner.gate = self.gate

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.experts.runner.gate(x))


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = layers.VocabParallelEmbedding(61, 24)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": Block()}) for _ in range(2))
        self.lm_head = layers.ParallelLMHead(61, 24)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer["mlp"](x)
        return {"logits": self.lm_head(x)}


def gate_case(folder: Path) -> Case:
    """Adapter "a" names the gates as `gate`, "b" as `experts.runner.gate`."""
    torch.manual_seed(0)
    base = Parallel()
    randomise(base)
    blocks = [path for path, module in base.named_modules() if hasattr(module, "experts")]
    gates = [f"{path}.gate" for path in blocks]
    return hand_case(base, folder, a=gates, b=[f"{path}.experts.runner.gate" for path in blocks])


def test_a_gate_also_reached_through_its_experts(tmp_path: Path) -> None:
    case = gate_case(tmp_path)
    config = LoraConfig(target_modules=["mlp.gate"], max_rank=4)
    cm = lorafx.compile(case.model(), config, adapters=case.folders, options=REFERENCE)
    inputs = token_inputs(4, 5)
    inputs["attention_mask"].fill_(1)
    check_mixed(cm, case, NAMES, inputs)
    # One site and one bank, under the path of named_modules; the other path is told as an alias.
    _, sites = build_sites(case.model(), config)
    canonical = [path for path, _ in case.base.named_modules() if path.endswith("gate")]
    assert [site.path for site in sites] == canonical
    assert all(len(site.paths) == 2 for site in sites)
    report = str(cm.explain())
    assert f"sites: {len(canonical)}\n" in report
    assert f"banks: {len(canonical)}," in report
    for site in sites:
        assert f"  {site.path} is also {site.aliases[0]}: one module, with one delta\n" in report
    # Layers that are alike share a line.
    assert sum("  layers.{0-1}.mlp.gate: " in line for line in report.splitlines()) == 1


def test_any_of_the_paths_is_a_target(tmp_path: Path) -> None:
    case = gate_case(tmp_path)
    for target in ("mlp.gate", "runner.gate", "gate", "layers.1.mlp.experts.runner.gate"):
        _, sites = build_sites(case.base, LoraConfig(target_modules=[target]))
        assert [site.path for site in sites][-1:] == ["layers.1.mlp.gate"]
    _, sites = build_sites(
        case.base, LoraConfig(target_modules=["gate"], exclude_modules=["layers.0.mlp.gate"])
    )
    assert [site.path for site in sites] == ["layers.1.mlp.gate"]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.again = self.first

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.tanh(self.first(x))}


def test_two_paths_in_one_adapter(tmp_path: Path) -> None:
    """With one tensor they are one, with different ones an error."""
    base = Shared().eval().requires_grad_(False)
    pair, other = (factors(base, ["first"], rank=2, seed=seed)["first"] for seed in (0, 1))
    folder = save(base, tmp_path / "a", {"first": pair, "again": pair})
    case = Case(base, {"a": folder}, {"a": merged(base, {"first": pair})})
    check_mixed(case.compile(), case, ["a", None], {"x": torch.randn(2, 3, K)})
    folder = save(base, tmp_path / "b", {"first": pair, "again": other})
    with pytest.raises(CheckpointError, match=r"again\.lora_\w.* of first and differ; keep one"):
        lorafx.compile(base, {"b": folder}, options=REFERENCE)
    assert not any(module._forward_hooks for module in base.modules())


class Containers(nn.Module):
    """Instances reached by an attribute, a list and a dict; each is called by one or more."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(K, K)
        self.chain = nn.ModuleList([nn.Linear(K, K), self.up])
        self.by_name = nn.ModuleDict({"zero": self.chain[0], "up": self.up})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for module in self.chain:
            x = x + torch.tanh(module(x))
        return {"logits": self.by_name["zero"](x) + self.up(x * 0.5)}


PATHS: Mapping[Any, tuple[list[str], list[str], dict[str, int]]] = {
    Containers: (["up", "by_name.zero"], ["chain.1"], {"up": 3, "chain.0": 2}),
}


@pytest.mark.parametrize("cls", PATHS)
def test_aliases_end_and_add_the_delta_at_every_call(tmp_path: Path, cls: Any) -> None:
    a, b, counts = PATHS[cls]
    torch.manual_seed(0)
    base = cls()
    randomise(base)
    case = hand_case(base, tmp_path, a=a, b=b)
    cm = case.compile()
    check_mixed(cm, case, NAMES, {"x": torch.randn(4, 3, K)})
    graph, sites = build_sites(case.model(), LoraConfig())
    assert {site.path: len(site.paths) for site in sites} == counts
    assert [path for path, _ in graph.modules()] == [path for path, _ in base.named_modules()]
    eager = lorafx.attach(case.model(), case.folders, options=REFERENCE)
    x = torch.randn(2, 3, K)
    with torch.no_grad(), lorafx.adapters(eager, ["b", "b"]):
        assert error(eager(x)["logits"], case.expected(["b", "b"], {"x": x})) <= TOLERANCE


@pytest.mark.quick
def test_paths_are_bounded_and_at_knows_them_all():
    """Ten levels, each holding the next twice: 1024 paths to the leaf."""
    leaf = nn.Linear(2, 2)
    model: nn.Module = leaf
    for _ in range(10):
        holder = nn.Module()
        holder.left = holder.right = model
        model = holder
    graph = ModuleGraph(model)
    paths = graph.paths(leaf)
    assert len(paths) == len(set(paths)) == MAX_PATHS
    assert paths[0] == ".".join(["left"] * 10)
    last = ".".join(["right"] * 10)
    assert last not in paths
    assert graph.at(last) is leaf
    assert len(graph.paths(leaf, limit=2000)) == 1024
