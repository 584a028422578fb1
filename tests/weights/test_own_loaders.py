"""Parameters that bring a `weight_loader`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafx
from lorafx.errors import BaseWeightsError

pytestmark = pytest.mark.quick

REFERENCE = {"lowering": "reference"}
MEMBERS = ["q_proj", "k_proj", "v_proj"]


class Loading(nn.Module):
    """qkv_proj takes its whole, or a third of it by a shard id."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(8, 24, bias=False)

        def load(parameter: nn.Parameter, loaded: Tensor, shard_id: Any = None) -> None:
            index = shard_id[0] if isinstance(shard_id, tuple) else shard_id
            part = parameter.data if index is None else parameter.data.chunk(3)[index]
            part.copy_(loaded)

        self.qkv_proj.weight.weight_loader = load  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv_proj(x)


@pytest.mark.parametrize("packed", [MEMBERS, {name: i for i, name in enumerate(MEMBERS)}])
@pytest.mark.parametrize("once", [False, True], ids=["list", "generator"])
def test_shards_of_an_own_loader(packed: Any, once: bool) -> None:
    """All members or the whole, each once."""
    model = Loading().eval()
    config = lorafx.LoraConfig(packed_modules={"qkv_proj": packed})
    cm = lorafx.compile(model, config, options=REFERENCE)
    whole = torch.randn(24, 8)
    parts = {f"{name}.weight": t for name, t in zip(MEMBERS, whole.chunk(3), strict=True)}

    def push(state: dict[str, Tensor]) -> Any:
        return cm.load_weights(iter(state.items()) if once else state)

    push({"qkv_proj.weight": whole})
    assert torch.equal(model.qkv_proj.weight, whole)
    push({name: part + 1 for name, part in parts.items()})
    assert torch.equal(model.qkv_proj.weight, whole + 1)
    lacking = {name: part for name, part in parts.items() if name != "v_proj.weight"}
    with pytest.raises(BaseWeightsError, match=r"nothing in the checkpoint for v_proj.weight"):
        push(lacking)
    report = cm.load_weights({n: part + 1 for n, part in lacking.items()}, strict=False)
    assert report.missing == ("qkv_proj.weight",)
    both = {"qkv_proj.weight": whole, "q_proj.weight": parts["q_proj.weight"]}
    for state in (both, dict(reversed(both.items()))):
        with pytest.raises(BaseWeightsError, match="a duplicate of"):
            push(state)
    assert torch.equal(model.qkv_proj.weight, whole + 1)
