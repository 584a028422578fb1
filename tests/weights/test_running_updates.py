"""What may not happen while base weights are updated or written by somebody else, and what a merge
does not lose or leave behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from dense_merge import REFERENCE
from torch import Tensor, nn

import lorafx
from lorafx.errors import BatchError, CaptureError, ConfigError


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def served(model: nn.Module, tmp_path: Path, targets: list[str], gain: float = 1.0) -> Any:
    folder = oracle.save_adapter(model, tmp_path / "own", rank=2, targets=targets, gain=gain)
    return lorafx.compile(copy.deepcopy(model), {"own": folder}, options=REFERENCE)


def base() -> nn.Module:
    torch.manual_seed(0)
    return Two().eval().requires_grad_(False)


ACTIONS: dict[str, Callable[[Any, Path], Any]] = {
    "call": lambda cm, _: cm(torch.randn(2, 8)),
    "merge": lambda cm, _: cm.merge("own"),
    "load_weights": lambda cm, _: cm.load_weights(base().state_dict()),
    "export_merged": lambda cm, folder: cm.export_merged("own", folder),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_not_while_new_weights_come(action: str, tmp_path: Path) -> None:
    """A function that yields weights runs inside the update; the old ones stay."""
    cm = served(base(), tmp_path, ["a", "b"])
    old = {name: value.clone() for name, value in cm._orig_mod.state_dict().items()}

    def pairs() -> Iterator[tuple[str, Tensor]]:
        yield "a.weight", torch.randn(12, 8)
        ACTIONS[action](cm, tmp_path / "out")
        yield "b.weight", torch.randn(8, 12)

    with pytest.raises(BatchError, match=r"base weights (is running|are being updated)"):
        cm.load_weights(pairs)
    assert all(torch.equal(cm._orig_mod.state_dict()[name], value) for name, value in old.items())
    cm.merge("own")  # all is as before
    cm.unmerge()


def test_not_while_an_adapter_is_merged(tmp_path: Path) -> None:
    cm = served(base(), tmp_path, ["a"])
    cm.merge("own")
    merged = {name: value.clone() for name, value in cm._orig_mod.state_dict().items()}
    new = {name: value + 1 for name, value in merged.items()}
    with pytest.raises(ConfigError, match=r"'own' is merged .* unmerge\(\) before load_weights"):
        cm.load_weights(new)
    assert cm.merged == "own"
    assert all(
        torch.equal(cm._orig_mod.state_dict()[name], value) for name, value in merged.items()
    )
    cm.unmerge()
    cm.load_weights(new)
    assert all(torch.equal(cm._orig_mod.state_dict()[name], value) for name, value in new.items())


def test_writes_through_data_are_seen(tmp_path: Path) -> None:
    cm = served(base(), tmp_path, ["a"])
    cm.merge("own")
    cm._orig_mod.a.weight.data[3, 5] += 1  # torch counts no write
    with pytest.raises(CaptureError, match=r"a\.weight: something wrote or replaced these weights"):
        cm.unmerge()
