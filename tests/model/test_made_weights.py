"""Weights that a hook or a parametrisation computes: right in their module's call, refused past it.

The oracle is the same module with a plain weight of the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils as utils
from dense_merge import REFERENCE, TOLERANCE, Case, error, save_adapter
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lorafx
from lorafx.errors import MatchError

K = 8
NAMES = ["a", None, "b", "a"]
X = torch.randn(4, 3, K, generator=torch.Generator().manual_seed(0))


def pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", 0.4)


MAKERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "prune": pruned,
    "weight_norm, a hook": utils.weight_norm,
    "spectral_norm, a hook": utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
HOOKS = ("prune", "weight_norm, a hook", "spectral_norm, a hook")

USES: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "call": lambda w, x: w(x),
    "behind the call": lambda w, x: w(x) + torch.tanh(F.linear(x.flip(-1), w.weight)),
    "before the call": lambda w, x: torch.tanh(F.linear(x.flip(-1), w.weight)) + w(x),
    "instead of it": lambda w, x: F.linear(x, w.weight),
}


class Model(nn.Module):
    def __init__(self, w: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.use = w, use

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.use(self.w, x)}


def served(maker: str, use: str, folder: Path, start: str) -> tuple[Any, Case]:
    torch.manual_seed(0)
    plain = nn.Linear(K, K)
    made = MAKERS[maker](copy.deepcopy(plain)).eval()
    with torch.no_grad():
        made(X)
        plain.weight.copy_(made.weight)
    case = Case(Model(plain, USES[use]).eval().requires_grad_(False), {})
    for rank, name in enumerate(("a", "b"), 2):
        path = folder / name
        case.folders[name] = save_adapter(case.base, path, rank=rank, targets=["w"], seed=rank)
    options = {**REFERENCE, "start": start, "cache": None}
    return lorafx.compile(
        Model(made, USES[use]).eval(), adapters=case.folders, options=options
    ), case


@pytest.mark.parametrize("start", ["eager", "compiled"])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_call_of_its_module(maker: str, start: str, tmp_path: Path) -> None:
    cm, case = served(maker, "call", tmp_path, start)
    for names in (NAMES, ["a"] * 4):
        got = cm(x=X, adapter_names=names)["logits"]
        assert error(got, case.expected(names, {"x": X})) <= TOLERANCE
    assert (cm.recompiles == 0) is (start == "eager")
    with pytest.raises(MatchError, match=r"computed anew for each call, by a (hook|param)"):
        cm.merge("a")
    assert cm.merged is None


@pytest.mark.parametrize("start", ["eager", "compiled"])
@pytest.mark.parametrize("use", [use for use in USES if use != "call"])
@pytest.mark.parametrize("maker", ["weight_norm, a hook", "weight_norm"])
def test_its_use_past_the_call_is_right_or_refused(
    maker: str, use: str, start: str, tmp_path: Path
) -> None:
    cm, case = served(maker, use, tmp_path, start)
    if maker in HOOKS and use != "behind the call":  # the tensor of the call before
        for _ in range(2):
            got = cm(x=X, adapter_names=NAMES)["logits"]
            assert error(got, case.expected(NAMES, {"x": X})) <= TOLERANCE
        return
    with pytest.raises(MatchError, match=r"at w: .* computes its weight, which is used outside"):
        cm(x=X, adapter_names=NAMES)
    base = case.expected([None] * 4, {"x": X})
    assert error(cm(x=X, adapter_names=[None] * 4)["logits"], base) <= TOLERANCE


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


@pytest.mark.parametrize("start", ["eager", "compiled"])
def test_behind_a_forward_of_its_own_it_is_refused(start: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(parametrizations.weight_norm(Activated(K, K)), USES["call"]).eval()
    base = Model(Activated(K, K), USES["call"])
    folder = save_adapter(base, tmp_path / "a", rank=2, targets=["w"], seed=0)
    options = {**REFERENCE, "start": start, "cache": None}
    cm = lorafx.compile(model, adapters={"a": folder}, options=options)
    with pytest.raises(MatchError, match="at w: its class overrides forward, and a hook or a para"):
        cm(x=X, adapter_names=["a", None, "a", "a"])
