"""A message that is logged once breaks no graph: rows stay proved behind it."""

from __future__ import annotations

import logging

import torch
from dense_merge import REFERENCE
from torch import nn
from transformers.utils.logging import get_logger

#: `warning_once` is a method that transformers gives all loggers.
LOG = get_logger("transformers.tests")


class Warns(nn.Module):
    """Its forward gives a warning, once or each time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, each: bool = False) -> torch.Tensor:
        x = x + 1
        if each:
            LOG.warning("each time")
        else:
            LOG.warning_once("once")
        return self.linear(x)


def test_one_graph_and_one_message(small, monkeypatch):
    cm = small(Warns, ["linear"]).compile(REFERENCE)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.msg)  # type: ignore[method-assign]
    monkeypatch.setattr(LOG, "handlers", [handler])
    x, mixed = torch.randn(2, 4), {"adapter_names": ["a", None]}
    for _ in range(2):
        cm(x, **mixed)
    assert (said, cm.recompiles) == (["once"], 1)
    for _ in range(2):
        cm(x, each=True, **mixed)
    assert said == ["once", "each time", "each time"]
