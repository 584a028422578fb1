"""Collectives keep every row where it was, unless the ranks' rows are put after one another."""

import pytest
import torch
import torch.distributed as dist
from ownership_graphs import labelled, taint

from lorafx.ownership.labels import Mixed, Own

pytestmark = pytest.mark.quick

X = torch.arange(3 * 5 * 4, dtype=torch.float64).view(3, 5, 4).sin()  # (B, T, K)
ops = torch.ops._c10d_functional


@pytest.fixture
def group(tmp_path):
    """The name of a group with this process alone: its collectives run."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def reduced(x, group):
    return ops.wait_tensor(ops.all_reduce(x * 2, "sum", group)) + 1


def gathered(x, group):
    """As `TensorParallel.all_gather`: along a dimension of its own, which becomes the last."""
    ranks = ops.wait_tensor(ops.all_gather_into_tensor(x.unsqueeze(0), 1, group))
    return ranks.movedim(0, -2).flatten(-2)


def gathered_rows(x, group):
    return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), 1, group))


@pytest.mark.parametrize("fn", [reduced, gathered])
def test_rows_stay_where_they_are(fn, group):
    label, flow, gm = labelled(lambda x: fn(x, group), [X], [Own(0)])
    assert isinstance(label, Own)
    assert (label.dim, label.rows, label.perm) == (0, 1, None)
    changed = X.clone()
    changed[1] += 1.5
    assert taint(gm, flow, [X], [changed], 1, 3) == []


def test_rows_of_several_ranks_one_after_another_are_given_up(group):
    label, _, _ = labelled(lambda x: gathered_rows(x, group), [X], [Own(0)])
    assert isinstance(label, Mixed)
    assert "gathered along their own dimension" in label.reason
