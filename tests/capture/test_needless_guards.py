"""Which guards of a graph are checked before each call."""

from __future__ import annotations

from collections.abc import Sequence
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
        at = {source_text(guard.orig_guard): guard.value for guard in guards}.get
        kept = keep_guards(guards, at)
    finally:
        for each in models:
            lorafx.detach(each)
    assert kept == [True, *[False] * 6, True]


class Views(Sequence[Any]):
    """What a property makes anew each time, as transformers' `config.per_layer_config`."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError
        return self.settings


class Settings:
    size = 1.0

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)

    @property
    def views(self) -> Views:
        return Views(self)


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        for view in self.settings.views:
            x = x + view.size
        return x


def test_guards_on_what_is_a_new_object_each_time() -> None:
    """torch 2.11 and 2.12 refused to make them twice."""
    model, x = Viewing().eval(), torch.randn(3, 4)
    with torch.no_grad():
        wanted = model(x)
    cm = lorafx.compile(model, CONFIG, options=REFERENCE)
    torch.testing.assert_close(cm(x), wanted)
