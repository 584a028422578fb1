"""Which guards of a graph are checked before each call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_merge import REFERENCE
from torch import nn
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource, GetItemSource, LocalSource
from torch._dynamo.types import GuardFilterEntry
from torch._guards import Source

import lorafx
from lorafx.capture.needless_guards import keep_guards
from lorafx.torch_compile.attached import marks_of
from lorafx.torch_internals.frames import source_text

pytestmark = pytest.mark.quick
CONFIG = lorafx.LoraConfig(max_rank=2, target_modules="all-linear")


def guard_on(source: Source, value: Any) -> GuardFilterEntry:
    """As Dynamo shows a guard to the filter."""
    guard = source.make_guard(GuardBuilder.ID_MATCH)
    return GuardFilterEntry(source_text(guard), True, value, "ID_MATCH", (), False, guard)


def test_what_is_called_almost_as_a_mark_is_no_part_of_it() -> None:
    module, other = (nn.Sequential(nn.Linear(4, 4)).eval() for _ in range(2))
    models = [lorafx.attach(each, CONFIG, options=REFERENCE) for each in (module, other)]
    try:
        (first,), (second,) = map(marks_of, models)
        self = LocalSource("self")
        guards = [guard_on(self, module)]
        for number, mark in ((1, first), (12, second)):
            place = GetItemSource(AttrSource(self, "_forward_hooks"), number)
            active = AttrSource(AttrSource(place, "runtime"), "active")
            sizes = AttrSource(place, "sizes")
            guards += [guard_on(place, mark), guard_on(active, True), guard_on(sizes, mark.sizes)]
        guards.append(guard_on(AttrSource(self, "_forward_hooks_1"), torch.tensor(2.0)))
        kept = keep_guards(guards)
    finally:
        for each in models:
            lorafx.detach(each)
    assert kept == [True, False, True, False, False, True, False, True]
