"""Methods that change all of W, as functions of it.

HiRA    W′ = W ∘ (1 + B A)
"""

from __future__ import annotations

from torch import Tensor

from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.methods.method import AdapterMethod, Given


def _hira(given: Given) -> ChangedWeight:
    a, b = given.take("hira_A", "r", "K"), given.take("hira_B", "N", "r")
    return ChangedWeight(_hira_weight, (a, b), len(b), a.shape[1])


def _hira_weight(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return weight + weight * (b @ a)


HIRA = AdapterMethod(
    name="HiRA",
    peft_type="HIRA",
    marks="hira_[AB]",
    read=_hira,
    training=frozenset({"hira_dropout", "init_weights"}),
    form="own weight",
    rank="—",
)
