"""Adapters on one convolution alone: only the shapes of its factors say their rank."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import lorafx


class Alone(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()


#: Class, size of one request and settings.
CONVOLUTIONS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "1d of one channel": (nn.Conv1d, (1, 9), {"kernel_size": 2}),
    "1d pointwise": (nn.Conv1d, (4, 9), {"kernel_size": 1}),
    "2d in groups": (nn.Conv2d, (4, 5, 6), {"kernel_size": 2, "groups": 4}),
    "3d": (nn.Conv3d, (2, 4, 4, 4), {"kernel_size": 2}),
}


def by_peft(base: nn.Module, folder: Path) -> nn.Module:
    """W + ΔW; PEFT's own model with groups, which it does not merge."""
    if base.body[0].groups == 1:
        return oracle.merged(base, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@torch.no_grad()
def test_an_adapter_on_one_convolution(kind: str, tmp_path: Path) -> None:
    """Without `max_rank`, which is the largest of the files."""
    cls, sizes, settings = CONVOLUTIONS[kind]
    torch.manual_seed(0)
    base = Alone(cls(sizes[0], 8, **settings)).eval().requires_grad_(False)
    folders = {
        name: oracle.save_adapter(base, tmp_path / name, rank=rank, targets=["body.0"], seed=rank)
        for name, rank in (("small", 4), ("large", 12))
    }
    options = {"lowering": "reference"}
    cm = lorafx.compile(copy.deepcopy(base), adapters=folders, options=options)
    names = ["large", None, "small", "large", "large", None, "small"]
    x = torch.randn(len(names), *sizes)
    alone = {None: base, **{name: by_peft(base, folder) for name, folder in folders.items()}}
    rows = [alone[name](row[None]) for name, row in zip(names, x, strict=True)]
    oracle.assert_close(cm(x, adapter_names=names), [torch.cat(rows)])
    assert oracle.difference([rows[0]], [base(x[:1])]) > 1e-3
