"""What benchmarks/moe.py measures: adapters of every expert and router, floors, PEFT's refusal."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafx

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import moe_cases

    with torch.no_grad():
        yield moe_cases


def test_a_mixed_batch_is_right_and_touches_all_kinds_of_sites(cases: Any, tmp_path: Path) -> None:
    model = cases.build_model("tiny", 1, torch.float32)
    paths = cases.save_adapters(model, tmp_path, 2)
    options = {"lowering": "reference"}
    cm = lorafx.compile(copy.deepcopy(model), paths, options=options, dynamic=False)
    names = {site.path.rpartition(".")[2] for site in cm.sites}
    assert names == {*cases.TARGETS, "gate_up_proj", "down_proj", "gate"}
    ids = torch.arange(6).view(3, 2)

    def serve(adapters: Any) -> torch.Tensor:
        return cm(input_ids=ids, use_cache=False, adapter_names=adapters).logits

    error, _ = cases.errors(model, paths, serve, ids)
    assert error < 1e-5
    base = serve([None] * 3)
    changed = (serve(["a0", "a1", None]) - base).abs().amax((1, 2))
    assert (changed > 1e-3).tolist() == [True, True, False]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("distinct", [0, 1, 4])
def test_floor(cases: Any, tokens: int, distinct: int) -> None:
    """By a walk over every weight and factor that a step needs."""
    model = cases.build_model("tiny", 2, torch.float32)
    ids = torch.arange(4 * tokens).view(4, tokens)
    chosen = cases.routes(model, ids)
    assert [layer.shape for layer in chosen] == [(4 * tokens, 4)] * 2
    once = tokens == 1  # decode counts what is read, prefill what is multiplied
    read: set[object] = set()
    weights = factors = 0.0

    def need(key: object, size: int) -> int:
        if once and key in read:
            return 0
        read.add(key)
        return size

    linears = {
        n: m for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() == 2
    }
    del linears["model.embed_tokens"]
    for row in range(4 * tokens):
        adapter = row // tokens % max(distinct, 1)
        for name, module in linears.items():
            n, k = module.weight.shape
            weights += need(name, n * k)
            if name != "lm_head":
                factors += need((name, adapter), n + k)
        for layer, block in enumerate(model.model.layers):
            for expert in chosen[layer][row].tolist():
                for weight in ("gate_up_proj", "down_proj"):
                    n, k = getattr(block.mlp.experts, weight).shape[1:]
                    weights += need((layer, weight, expert), n * k)
                    factors += need((layer, weight, expert, adapter), n + k)
    want = 1 + cases.RANK * factors / weights if distinct else 1.0
    assert cases.floor_of(model, ids, chosen, distinct) == pytest.approx(want)


def test_peft_refuses_mixed_batches_here(cases: Any, tmp_path: Path) -> None:
    assert "mixed adapter batches" in cases.peft_refusal(tmp_path)
