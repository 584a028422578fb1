"""Values written to a mask's positions, and tensors of one request alone: what is proved of them,
and what must not be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, case_by_targets, error
from ownership_graphs import labelled, taint
from torch import Tensor, nn
from torch.library import opcheck

import lorafx
import lorafx.kernels.ops.row_ops
from lorafx.errors import BatchError
from lorafx.ownership.labels import Mixed, One, Own

pytestmark = pytest.mark.quick

B, T, P, K = 3, 5, 2, 4
X = torch.arange(B * T * K, dtype=torch.float64).view(B, T, K).sin()
MASK = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]).bool()
SOURCE = torch.arange(B * P * K, dtype=torch.float64).view(B, P, K).cos()


def indexed(x, mask, source):
    x = x.clone()
    x[mask] = source.flatten(0, 1)
    return x


WRITES = {
    "scatter": (lambda x, m, s: x.masked_scatter(m[..., None], s), (0, 0, 0), Own),
    "indexed": (indexed, (0, 0, 0), Own),
    "shared source": (lambda x, m, s: x.masked_scatter(m[..., None], s), (0, 0, None), Own),
    "shared x and mask": (
        lambda x, m, s: x.masked_scatter(m[..., None], s),
        (None, None, 0),
        Mixed,
    ),
    "x by tokens": (
        lambda x, m, s: x.transpose(0, 1).masked_scatter(m.T[..., None], s),
        (0, 0, 0),
        Mixed,
    ),
    "source twice": (
        lambda x, m, s: x.masked_scatter(m[..., None], torch.cat([s, s])),
        (0, 0, 0),
        Mixed,
    ),
    "one mask for all": (lambda x, m, s: x.masked_scatter(m[:1, :, None], s), (0, None, 0), Mixed),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_to_a_mask(name):
    fn, dims, expected = WRITES[name]
    seeds = [None if dim is None else Own(dim) for dim in dims]
    static = (0, 1, 2) if name == "indexed" else ()  # its rule compares feature sizes
    label, flow, gm = labelled(fn, [X, MASK, SOURCE], seeds, static, assume=True)
    assert isinstance(label, expected)
    asked = expected is Own and dims[2] is not None
    assert len(flow.fits) == asked
    before = [X, MASK, SOURCE]
    for request in range(B):
        after = [t.clone() for t in before]
        for tensor, dim in zip(after, dims, strict=True):
            if dim is not None and tensor is not after[1]:
                tensor[request] += 1.5
        assert taint(gm, flow, before, after, request, B) == []
    if asked:  # not where nobody asks
        assert isinstance(labelled(fn, [X, MASK, SOURCE], seeds, static)[0], Mixed)


def half(x):
    return x[1].relu() @ torch.ones(K, K, dtype=x.dtype)


def laid(x):
    y = torch.zeros_like(x)
    for i in range(len(x)):
        y[-1 - i] = x[-1 - i].tanh()
    return y


SINGLES = {
    "one row": (half, One(1)),
    "part": (lambda x: x.flatten(0, 1)[T : 2 * T - 1], One(1)),
    "over the edge": (lambda x: x.flatten(0, 1)[T - 1 : T + 1], Own),
    "joined": (lambda x: torch.cat(list(x)), Own(0, rows=T)),
    "split": (lambda x: torch.cat([p * 2 for p in x.flatten(0, 1).split(T)]), Own(0, rows=T)),
    "turned round": (lambda x: torch.cat([x[1], x[0], x[2]]), Own),
    "one is missing": (lambda x: torch.cat([x[0], x[1]]), Own),
    "ragged": (lambda x: torch.cat([x[1][:1], x[0]]).split([1, T])[0], One(1)),
    "of unequal lengths": (lambda x: torch.cat([x[0][1:], x[1], x[2][:2]]), Own),
    "stacked": (lambda x: torch.stack([x[2], x[1]]), Own),
    "laid one by one": (laid, Own(0)),
    "padded": (lambda x: nn.utils.rnn.pad_sequence([x[0], x[1][:1], x[2][1:]], True), Own(0)),
    "met by all": (lambda x: x + x[1], Mixed),
}


@pytest.mark.parametrize("name", SINGLES)
def test_tensors_of_one_request(name):
    """The number of requests is known as a number."""
    fn, expected = SINGLES[name]
    label, flow, gm = labelled(fn, [X], [Own(0)], static=(0,))
    assert isinstance(label, expected) if isinstance(expected, type) else label == expected
    for request in range(B):
        changed = X.clone()
        changed[request] += 1.5
        assert taint(gm, flow, [X], [changed], request, B) == []


@pytest.mark.parametrize("request_", [0, 2])
def test_a_constant_index_is_one_request_of_any_number(request_):
    assert labelled(lambda x: x[request_].tanh(), [X], [Own(0)])[0] == One(request_)
    tiled = labelled(lambda x: x.repeat(2, 1, 1)[request_], [X], [Own(0)])[0]
    assert isinstance(tiled, Mixed)  # of two requests, row 2 is the first's again


def test_masks_are_asked_about_mixed_batches_alone():
    op, slots = torch.ops.lorafx.own_mask, torch.tensor([0, -1, 0], dtype=torch.int32)
    mask = MASK[..., None]
    opcheck(op.default, (X, mask, SOURCE, slots))
    assert torch.equal(op(X, mask, SOURCE, slots), mask)
    for count in (1, 3):
        odd = mask.clone()
        odd[1] = (torch.arange(T) < count)[:, None]
        with pytest.raises(BatchError, match=rf"request 1 has {count} positions .* is 2, so"):
            op(X, odd, SOURCE, slots)
        assert torch.equal(op(X, odd, SOURCE, torch.zeros_like(slots)), odd)


HEADS, EACH = 4, 2


class CrossAttention(nn.Module):
    """The decoder's attention over what its encoder left, as BART's kin write it with `bmm`."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        for parameter in self.parameters():
            nn.init.normal_(parameter.requires_grad_(False), std=0.4)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> dict[str, Tensor]:
        rows, length, _ = x.shape
        folded = (rows * HEADS, -1, EACH)
        query = self.query(x).view(rows, length, HEADS, EACH).transpose(1, 2).reshape(folded)
        keys, values = keys.reshape(folded), values.reshape(folded)
        weights = torch.bmm(query, keys.transpose(1, 2))
        source = keys.shape[1]
        if weights.shape != (rows * HEADS, length, source):
            raise ValueError
        weights = weights.view(rows, HEADS, length, source) + mask
        weights = weights.view(rows * HEADS, length, source).softmax(-1)
        y = torch.bmm(weights, values).view(rows, HEADS, length, EACH).transpose(1, 2)
        return {"logits": self.out(y.reshape(rows, length, HEADS * EACH))}


def test_attention_over_a_cache_of_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = case_by_targets(CrossAttention().eval(), tmp_path, {"a": "query|out", "b": "out"})
    cm = lorafx.compile(case.model(), case.folders, dynamic=True, options=REFERENCE)
    for rows, source in ((3, 5), (4, 7)):
        inputs = {
            "x": torch.randn(rows, 1, HEADS * EACH),
            "keys": torch.randn(rows, HEADS, source, EACH),
            "values": torch.randn(rows, HEADS, source, EACH),
            "mask": torch.zeros(rows, 1, 1, source),
        }
        names = ["a", None, "b", "a"][:rows]
        got = cm(**inputs, adapter_names=names)["logits"]
        assert error(got, case.expected(names, inputs)) <= TOLERANCE
