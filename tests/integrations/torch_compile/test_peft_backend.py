"""`torch.compile(peft_model, backend="lorafx")` is PEFT's own answer, and the log says so once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from attached import fresh_dynamo
from dense_merge import REFERENCE, TOLERANCE, error, random_base, save_adapter
from peft import PeftModel
from tiny_models import FAMILIES
from torch import Tensor

__all__ = ["fresh_dynamo"]


@torch.no_grad()
def test_every_switch_of_peft_has_its_effect(tmp_path: Path) -> None:
    base = random_base("llama", num_hidden_layers=1)
    for index, name in enumerate("ab"):
        targets = ["q_proj", "o_proj", "down_proj"]
        save_adapter(base, tmp_path / name, rank=3 + index, seed=index, targets=targets)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"), "a").eval()
    model.load_adapter(str(tmp_path / "b"), "b")
    run = torch.compile(model, backend="lorafx", options=REFERENCE)
    torch.manual_seed(1)
    batch = FAMILIES["llama"].inputs(3, 5)

    def check(**kwargs: Any) -> Tensor:
        """The compiled model's logits are those of eager PEFT."""
        want = model(**batch, **kwargs).logits
        assert error(run(**batch, **kwargs).logits, want) <= TOLERANCE
        return want

    results = [check()]
    model.set_adapter("b")
    results.append(check())
    with model.disable_adapter():
        results.append(check())
    for index, one in enumerate(results):
        assert all(error(one, other) > 100 * TOLERANCE for other in results[:index])
    mixed = check(adapter_names=["a", "b", "__base__"])
    other = check(adapter_names=["b", "b", "a"])
    assert error(mixed[1], other[1]) <= TOLERANCE < 0.01 * error(mixed[0], other[0])
