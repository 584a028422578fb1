"""lorafx's operators in plain aten are the operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

import lorafx
from lorafx.package.aten import InAten

pytestmark = pytest.mark.quick

S, R, K, N = 3, 4, 5, 6


def bank(vocabulary: int | None = None) -> list[Tensor]:
    """A bank of two siblings, or of an embedding, with garbage beyond the ranks."""
    siblings = 2 if vocabulary is None else 1
    shape = (S, R, siblings * K) if vocabulary is None else (S, vocabulary, R)
    ranks = torch.tensor([[4, 2], [1, 3], [0, 4]], dtype=torch.int32)[:, :siblings].contiguous()
    return [torch.randn(shape), torch.randn(S, R, siblings * N), ranks, torch.rand(S, siblings)]


def in_aten(op: object, *arguments: object) -> Tensor:
    graph = fx.Graph()
    tensors = [item for item in arguments if isinstance(item, Tensor)]
    nodes = iter([graph.placeholder(f"x{n}") for n in range(len(tensors))])
    call = [next(nodes) if isinstance(item, Tensor) else item for item in arguments]
    graph.output(graph.call_function(op, tuple(call)))
    return InAten(fx.GraphModule(torch.nn.Module(), graph)).run(*tensors)


@pytest.mark.parametrize(
    ("shape", "rows"), [((4, 3), 3), ((12,), 3), ((3, 4), 1), ((2, 4, 3), 3), ((6, 4), 1)]
)
def test_site(shape: tuple[int, ...], rows: int) -> None:
    torch.manual_seed(0)
    slots = torch.tensor([1, -1, 0, 2], dtype=torch.int32)
    ranges = [1, 0], [N, 1], [N, 2]
    x, y = torch.randn(*shape, K), torch.randn(*shape, N + 2)
    op = torch.ops.lorafx.site.default
    arguments = x, y, *bank(), slots, *ranges, rows
    got = in_aten(op, *arguments)
    torch.testing.assert_close(got, op(*arguments))
    owners = slots[(torch.arange(got[..., 0].numel()) // rows) % 4].reshape(shape)
    assert torch.equal(got[owners < 0], y[owners < 0])


@pytest.mark.parametrize(("shape", "rows"), [((4, 3), 3), ((3, 4), 1)])
def test_embedding(shape: tuple[int, ...], rows: int) -> None:
    torch.manual_seed(0)
    slots = torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    ids, y = torch.randint(7, shape), torch.randn(*shape, N)
    op = torch.ops.lorafx.embedding_site.default
    arguments = ids, y, *bank(7), slots, rows
    torch.testing.assert_close(in_aten(op, *arguments), op(*arguments))


def test_indices_outside_of_a_table_raise() -> None:
    op, tail = torch.ops.lorafx.checked_index.default, ("the table", "ids{}")
    inside = torch.tensor([0, 4, -100])
    assert torch.equal(in_aten(op, inside, 5, False, -100, *tail), inside)
    assert torch.equal(
        in_aten(op, torch.tensor([-5, 4]), 5, True, None, *tail), torch.tensor([-5, 4])
    )
    for wrong, negative in ((5, False), (-1, False), (-6, True)):
        with pytest.raises(RuntimeError, match="lorafx: ids points outside of the 5 entries"):
            in_aten(op, torch.tensor([0, wrong]), 5, negative, None, *tail)


def test_others_are_refused_by_name() -> None:
    op = torch.ops.lorafx.expert_mark.default
    with pytest.raises(lorafx.LoweringError, match=r"lorafx\.expert_mark\.default is not exported"):
        in_aten(op, torch.randn(2, 3), torch.randn(2, 3, 4))
