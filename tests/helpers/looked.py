"""Compiled models of three kinds, each with an adapter that does something and one whose B is 0."""

from __future__ import annotations

from pathlib import Path

import peft
from dense_merge import REFERENCE, Case
from tiny_models import FAMILIES

import lorafx

#: Of each family, targets of the adapter "idle", which is saved as PEFT initialises it: B = 0.
IDLE = {"llama": ["q_proj", "down_proj"], "vit": ["fc1", "q_proj"], "plain": ["up", "head"]}
NAMES = ["a1", None, "a0", "idle"]


class Looked:
    """A compiled model that has served one mixed batch, and one of the base."""

    def __init__(self, case: Case, family: str, folder: Path) -> None:
        self.case, self.family = case, family
        wrapped = peft.get_peft_model(
            case.model(), peft.LoraConfig(r=3, target_modules=_targets(case, IDLE[family]))
        )
        wrapped.save_pretrained(str(folder))
        names = {name: case.folders[name] for name in ("a0", "a1", "a3")}
        config = lorafx.LoraConfig(max_rank=8, max_adapters=4)
        # For any sizes whichever file asks first: some files compile for fixed ones by default.
        self.cm = lorafx.compile(
            case.model(),
            config,
            adapters={**names, "idle": folder},
            dynamic=True,
            options=REFERENCE,
        )
        self.inputs = FAMILIES[family].inputs(len(NAMES), 5)
        self.output = self.cm(**self.inputs, adapter_names=NAMES)["logits"]
        self.cm(**self.inputs)


def _targets(case: Case, names: list[str]) -> list[str]:
    """Those of the names that the model has, or all its linears."""
    have = {path.rpartition(".")[2] for path, _ in case.base.named_modules()}
    return [name for name in names if name in have] or ["dense"]
