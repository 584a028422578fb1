"""write_in_place on graphs built by hand: what AOTAutograd copies back is written at once."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import shown
from site_graphs import Finished, Holder, SiteGraph
from torch import fx, nn

from lorafx.kernels.ops.paged_attention import PAGED_CACHE
from lorafx.op_arguments import TRACED_WRITE
from lorafx.passes.write_in_place import WriteInPlace

pytestmark = pytest.mark.quick

aten = torch.ops.aten
TOKENS, HEADS, SIZE = 3, 2, 4
NUMBERS = 16 * HEADS * SIZE


class Steps:
    """Layers that write into one cache, each with what it reads."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.g = SiteGraph(Holder(w=nn.Linear(4, 4)), [0])
        states = torch.randn(2, 1, HEADS, TOKENS, SIZE).unbind()
        places = torch.tensor([0, 3, 4, 5]), torch.tensor([3, 4, 5])
        pages = torch.randn(NUMBERS).view(torch.uint8)
        *self.given, self.read, self.write, self.pages = (
            self.g.argument(value) for value in (*states, *places, pages)
        )
        self.results: list[fx.Node] = []

    def layer(self, cache: fx.Node, first: int, **view: object) -> fx.Node:
        """Another one, on rows from `first` on; returns the cache as it has written it."""
        key, value = self.given
        call = self.g.call(
            TRACED_WRITE,
            PAGED_CACHE,
            **{"key": key, "value": value, "read": self.read, "write": self.write},
            **{"first_key": first, "first_value": first + 6, "sentinel": -1, "ring": False},
            **{"seen": None, "mask": None, "_cache_base_index": 0, **view, "_all_bases": [cache]},
        )
        items = [self.g.call(operator.getitem, call, place) for place in range(3)]
        self.results += items[:2]
        return items[2]

    def done(self, written: fx.Node, *others: fx.Node) -> Finished:
        self.g.call(aten.copy_.default, self.pages, written)
        return self.g.output(*self.results, *others)


def run(done: Finished) -> list[torch.Tensor]:
    """What a graph returns, and what it leaves in the cache."""
    values = [value.clone() for value in done.values]
    return [*done.gm(*values), values[-1].view(torch.float32)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_the_graph_before_and_after() -> None:
    steps = Steps()
    done = steps.done(steps.layer(steps.layer(steps.pages, 0), 2))
    want = run(done)
    assert_expected_inline(
        shown(done, WriteInPlace()),
        """\
auto_functionalized_v2 = auto_functionalized_v2(lorafx.paged_cache, x, x_1, x_2, x_3, 0, 6,
    -1, False, None, None, 0, [x_4])
getitem = getitem(auto_functionalized_v2, 0)
getitem_1 = getitem(auto_functionalized_v2, 1)
getitem_2 = getitem(auto_functionalized_v2, 2)
auto_functionalized_v2_1 = auto_functionalized_v2(lorafx.paged_cache, x, x_1, x_2, x_3, 2,
    8, -1, False, None, None, 0, [getitem_2])
getitem_3 = getitem(auto_functionalized_v2_1, 0)
getitem_4 = getitem(auto_functionalized_v2_1, 1)
getitem_5 = getitem(auto_functionalized_v2_1, 2)
copy_ = aten.copy_(x_4, getitem_5)
return getitem, getitem_1, getitem_3, getitem_4

write_in_place: 2 edits

paged_cache = lorafx.paged_cache(x, x_1, x_4, x_2, x_3, 0, 6, -1, False)
getitem = getitem(paged_cache, 0)
getitem_1 = getitem(paged_cache, 1)
paged_cache_1 = lorafx.paged_cache(x, x_1, x_4, x_2, x_3, 2, 8, -1, False)
getitem_2 = getitem(paged_cache_1, 0)
getitem_3 = getitem(paged_cache_1, 1)
return getitem, getitem_1, getitem_2, getitem_3
""",
    )
    assert same(run(done), want)
    assert not torch.equal(want[-1], done.values[-1].view(torch.float32))


def read_before(steps: Steps) -> Finished:
    """What the cache held is needed too."""
    old = steps.g.call(aten.clone.default, steps.pages)
    return steps.done(steps.layer(steps.pages, 0), old)


def read_between(steps: Steps) -> Finished:
    """What only the first layer has written is a result."""
    first = steps.layer(steps.pages, 0)
    old = steps.g.call(aten.clone.default, first)
    return steps.done(steps.layer(first, 2), old)


def never_copied_back(steps: Steps) -> Finished:
    steps.results.append(steps.layer(steps.pages, 0))
    return steps.g.output(*steps.results)


def a_part(steps: Steps) -> Finished:
    """The operator has a view of the cache, without its first rows."""
    start = 4 * HEADS * SIZE * 4
    view = {"dim": 0, "start": start, "end": 4 * NUMBERS}
    return steps.done(
        steps.layer(steps.pages, 0, **{f"_cache_slice_{name}": at for name, at in view.items()})
    )


@pytest.mark.parametrize("build", [read_before, read_between, never_copied_back, a_part])
def test_what_does_not_fit_is_left_as_it_is(build: Callable[[Steps], Finished]) -> None:
    done = build(Steps())
    before, want = done.targets(), run(done)
    assert done.run(WriteInPlace()) == 0
    assert done.targets() == before
    assert same(run(done), want)
