"""Forwards that take the batch apart, reorder it and join it again, in graphs and in eager mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dense_merge import TOLERANCE, Case, error
from slowly import few
from torch import Tensor, nn

from lorafx.errors import ProvenanceError

pytestmark = pytest.mark.quick

MIX = ["a", None, "b", "b"]


class Rows(nn.Module):
    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("order", torch.tensor([2, 0, -1, 1]))
        self.function = forward

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.function(self, x)}


def halves(m: Rows, x: Tensor) -> Tensor:
    first, last = m.up(x).chunk(2)
    return torch.cat([m.down(first), m.down(last.tanh())])


def halves_that_attend(m: Rows, x: Tensor) -> Tensor:
    parts = []
    for part in m.up(x)[:, None].expand(-1, 3, -1).split(3):
        heads = m.down(part).unflatten(-1, (2, 3)).transpose(1, 2).flatten(0, 1)
        heads = torch.bmm(torch.bmm(heads, heads.mT).softmax(-1), heads)
        parts.append(m.up(heads.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)))
    return torch.cat(parts)


def flipped_and_rolled(m: Rows, x: Tensor) -> Tensor:
    flipped = m.down(m.up(x).flip(0)).flip(0)
    return x + flipped + m.down(m.up(x).roll(1, 0)).roll(-1, 0)


def permuted(m: Rows, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[m.order] = m.down(m.up(x)[m.order])
    return m.up(out)


def ragged(m: Rows, x: Tensor) -> Tensor:
    rows = [m.up(x[i]).expand(i + 1, -1) for i in range(4)]
    padded = m.down(nn.utils.rnn.pad_sequence(rows, batch_first=True)).sum(1)
    parts = m.down(torch.cat(rows[::-1])).split([4, 3, 2, 1])
    return padded + torch.stack([part.mean(0) for part in parts[::-1]])


def one_by_one(m: Rows, x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape)
    for i in reversed(range(x.shape[0])):
        out[i] = m.up(x[i])
    return m.down(out)


@pytest.mark.parametrize("dynamic", few([True, False], True))
@pytest.mark.parametrize(
    "forward", [halves, halves_that_attend, flipped_and_rolled, permuted, ragged, one_by_one]
)
def test_rows_keep_their_adapters(small, forward, dynamic):
    case, x = small(lambda: Rows(forward), ["up"], ["up", "down"]), torch.randn(4, 6)
    got = case.compile(dynamic=dynamic)(x, adapter_names=MIX)["logits"]
    want = torch.stack([case.alone(name)(x)["logits"][b] for b, name in enumerate(MIX)])
    assert error(got, want) <= TOLERANCE


def halves_that_meet(m: Rows, x: Tensor) -> Tensor:
    first, last = m.up(x).split(2)
    return m.down(first + last)


def partly_filled(m: Rows, x: Tensor) -> Tensor:
    out = x.new_zeros(5, 6)
    out[:4] = m.up(x)
    return m.down(out)


@pytest.mark.parametrize(
    ("forward", "where"), [(halves_that_meet, "add"), (partly_filled, "belong to no request")]
)
def test_rows_of_two_requests_or_none_are_refused(small, forward, where):
    case: Case = small(lambda: Rows(forward), ["up", "down"])
    cm, x = case.compile(), torch.randn(4, 6)
    with pytest.raises(ProvenanceError, match=rf"{where}.*Options\(start='eager'\)"):
        cm(x, adapter_names=MIX)
    got = cm(x, adapter_names=["b"] * 4)["logits"]
    assert error(got, case.alone("b")(x)["logits"]) <= TOLERANCE
