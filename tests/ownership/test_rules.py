"""Each rule on the smallest functions: what it proves, and what it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ownership_graphs import by_keyword, label_graph, labelled, output_label, taint, trace
from slowly import each
from torch import fx

from lorafx.eager.following import Following
from lorafx.ownership.flow import Flow
from lorafx.ownership.labels import Mixed, Own
from lorafx.ownership.memory import Memory
from lorafx.ownership.propagate import flow_through
from lorafx.ownership.real_labels import Listed, RealLabel, listed
from lorafx.ownership.symbolic import BatchSymbols

pytestmark = pytest.mark.quick

X = torch.arange(3 * 5 * 4, dtype=torch.float64).view(3, 5, 4).sin()  # (B, T, K)
ROWS = torch.arange(6 * 4, dtype=torch.float64).view(6, 4).cos()
WEIGHT = torch.arange(4 * 7, dtype=torch.float64).view(4, 7).cos()
SQUARE = torch.eye(5, dtype=torch.float64) * 2 + 0.1
TABLE = torch.arange(6, dtype=torch.float64).view(2, 3).sin()
IDS = torch.tensor([[3, 1, 0, 2, 4], [0, 0, 4, 1, 2], [2, 4, 1, 3, 0]])


def rows_of(label: object) -> str | None:
    """A label as dim:rows (and p for a permutation), None, or the operator where it was lost."""
    if isinstance(label, Mixed):
        return label.reason.split(":: ")[0].split(":")[2] if "::" in label.reason else label.reason
    if label is None:
        return None
    assert isinstance(label, Own)
    return f"{label.dim}:{label.rows}{'p' if label.perm is not None else ''}"


def _exchanged(x):
    return torch.cat([x[1:], x[:1]])


def _back(x):
    return torch.cat([x[-1:], x[:-1]])


def _ordered_and_back(x):
    order = torch.arange(len(x)).roll(1)
    out = torch.zeros_like(x)
    out[order] = x[order].tanh()
    return x + out


BATCH_FIRST = {
    # pointwise and broadcasting
    "add_shared": (lambda x: x + torch.ones(4), "0:1"),
    "outer_sum": (lambda x: x[:, None] + x[None], "add"),
    # views, permutations, expansions
    "view_as_real": (lambda x: torch.view_as_real(torch.complex(x, x)), "0:1"),
    "transpose": (lambda x: x.transpose(0, 1), "1:1"),
    "heads": (lambda x: x.view(x.shape[0], -1, 2, 2).transpose(1, 2), "0:1"),
    "repeat_rows": (lambda x: x.repeat_interleave(2, 0), "0:2"),
    "tile_rows": (lambda x: x.repeat(2, 1, 1), "0:1"),
    "expand": (lambda x: x[:, :, None].expand(-1, -1, 6, -1), "0:1"),
    "windows": (lambda x: x.as_strided((x.shape[0], 3, 2, 4), (20, 4, 4, 1)), "0:1"),
    # pieces
    "narrow_rows": (lambda x: x[1:], "0:1p"),
    "last_rows": (lambda x: x[-2:], "0:1p"),
    "strided_rows": (lambda x: x[1::2], "0:1p"),
    "halves_joined": (lambda x: torch.cat([x[:1].relu(), x[1:].tanh()]), "0:1"),
    "halves_exchanged": (lambda x: torch.cat([x[1:], x[:1]]), "0:1p"),
    "halves_exchanged_twice": (lambda x: x + _back(_exchanged(x).tanh()), "0:1"),
    "a_part_as_one_dim": (lambda x: x[1:].flatten(0, 1).tanh().view(-1, *x.shape[1:]), "0:1p"),
    "of_copies": (lambda x: x.repeat_interleave(2, 0)[1:-1], "0:2p"),
    "last_token": (lambda x: x[:, -1], "0:1"),
    "every_other_copy": (lambda x: x.repeat_interleave(2, 0)[0::2], "0:1"),
    "cat_rows": (lambda x: torch.cat([x, 2 * x]), "0:1"),
    "cat_shared_rows": (lambda x: torch.cat([x, torch.ones(1, 5, 4)]), "cat"),
    "stack_front": (lambda x: torch.stack([x, x]), "1:1"),
    "pad_rows": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)), "constant_pad_nd"),
    "shift_time": (lambda x: x.roll(1, 1), "0:1"),
    "shift_rows": (lambda x: x.roll(1, 0), "0:1p"),  # decomposed
    "flip_rows": (lambda x: x.flip(0), "0:1p"),
    "flip_rows_twice": (lambda x: x + x.flip(0).tanh().flip(0), "0:1"),
    "flip_a_part": (lambda x: x[1:].flip(0)[:1], "0:1p"),
    "flipped_and_met": (lambda x: x + x.flip(0), "add"),
    # along dimensions
    "softmax": (lambda x: x.softmax(-1), "0:1"),
    "mean_time": (lambda x: x.mean(1), "0:1"),
    "topk": (lambda x: x.topk(2)[1], "0:1"),
    "layer_norm": (lambda x: F.layer_norm(x, (4,)), "0:1"),
    # contractions
    "linear": (lambda x: x @ WEIGHT, "0:1"),
    "scores": (lambda x: x @ x.transpose(1, 2), "0:1"),
    "distances": (lambda x: torch.cdist(x, torch.ones(3, 4).double()), "0:1"),
    "gram": (lambda x: torch.einsum("btk,ctk->bc", x, x), "bmm"),
    "conv1d": (lambda x: F.conv1d(x.transpose(1, 2), torch.ones(2, 4, 3).double()), "0:1"),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        "0:1",
    ),
    # writes
    "write_time": (lambda x: x.clone().index_fill_(1, torch.tensor([0]), 0.0), "0:1"),
    # choices
    "last_real_token": (lambda x: x[torch.arange(x.shape[0]), x.argmax(1)[:, 0]], "0:1"),
    "gather_time": (lambda x: x.gather(1, x.argsort(1)), "0:1"),
    "gather_rows": (lambda x: x.gather(0, (x > 0).long()), "gather"),
    "permuted_rows": (lambda x: x[torch.tensor([1, 0, -1])], "0:1p"),
    "chosen_rows": (lambda x: x.index_select(0, torch.tensor([1, 1, 0, 2])), "0:1p"),
    "permuted_and_back": (_ordered_and_back, "0:1"),
    "chosen_by_rows": (lambda x: x[x[:, 0, 0].long()], "index"),
    # batches of matrices and of others
    "solve": (lambda x: torch.linalg.solve_ex(SQUARE, x)[0], "0:1"),
    "solve_rows": (lambda x: torch.linalg.solve_ex(SQUARE, x[:, :, 0].T)[0], "_linalg_solve_ex"),
    "solve_vectors": (
        lambda x: torch.linalg.solve_ex(SQUARE.expand(x.shape[0], 5, 5), x[..., 0])[0],
        "0:1",
    ),
    "cholesky": (
        lambda x: torch.cholesky_solve(x, torch.linalg.cholesky_ex(x @ x.mT + SQUARE)[0]),
        "0:1",
    ),
    "householder": (lambda x: torch.linalg.householder_product(x, x[:, 0]), "0:1"),
    "cross": (lambda x: torch.linalg.cross(x[..., :3], x[..., 1:]), "0:1"),
    "bilinear": (lambda x: F.bilinear(x, x, torch.ones(2, 4, 4).double()), "0:1"),
    "diagonals": (lambda x: torch.diag_embed(x, dim1=0, dim2=2), "1:1"),
    "diagonal_rows": (lambda x: torch.diag_embed(x.transpose(0, 2)), "3:1"),
    "bags": (lambda x: F.embedding_bag((x[..., 0] > 0).long(), TABLE, mode="sum"), "0:1"),
    "bags_of_all": (
        lambda x: F.embedding_bag((x[..., 0] > 0).long().flatten(), TABLE, torch.tensor([0, 4])),
        "_embedding_bag_forward_only",
    ),
    "hardswish": (F.hardswish, "0:1"),
    "log_sigmoid": (F.logsigmoid, "0:1"),
    "losses": (lambda x: F.mse_loss(x, torch.ones(4).double(), reduction="none"), "0:1"),
    "mean_loss": (lambda x: F.mse_loss(x, torch.ones_like(x)), "mean"),
}


def kept(label: object) -> object:
    """A label without the reason for which there is none."""
    if isinstance(label, tuple):
        return tuple(map(kept, label))
    return Mixed if isinstance(label, Mixed) else label


def relabelled(gm: fx.GraphModule, flow: Flow) -> Flow:
    """The labels of a graph that has changed since `flow`, from its one input's."""
    (x,) = gm.graph.find_nodes(op="placeholder")
    seed = flow.labels[x]
    return flow_through(gm.graph, {x: seed}, BatchSymbols.of([x.meta["val"].shape[seed.dim]]))


@pytest.mark.parametrize("name", each(3, BATCH_FIRST))
def test_batch_first(name):
    fn, expected = BATCH_FIRST[name]
    label, flow, gm = labelled(fn, [X], [Own(0)], static=(0,) if "windows" in name else ())
    if isinstance(label, Mixed):
        assert expected is not None
        assert f"::{expected}" in label.reason
        assert "no rule for this operator" not in label.reason
    else:
        assert rows_of(label) == expected
    changed = X.clone()
    changed[1] += 1.5
    assert taint(gm, flow, [X], [changed], 1, 3) == []
    by_keyword(gm.graph)
    again = relabelled(gm, flow)
    for node, label in flow.labels.items():
        assert kept(again.labels[node]) == kept(label), node


def in_python(fn: Callable[[torch.Tensor], Any], x: torch.Tensor, dim: int) -> RealLabel | None:
    """The label of fn's first result where Python runs its operators."""
    memory = Memory()
    memory.add_shared([WEIGHT, SQUARE, TABLE, IDS])
    memory.note(x, listed(dim, tuple(range(x.shape[dim]))))
    with torch.no_grad(), Following(memory) as following:
        found = fn(x)
        return following.label(found[0] if isinstance(found, tuple) else found)


#: What eager mode does not know, though a graph proves it.
UNKNOWN = {
    "view_as_real": "labels are kept by elements of one size",
    "permuted_rows": "an index of Python's numbers, which may be those of a request",
    "chosen_rows": "the same",
    "diagonal_rows": "a graph has diag_embed in parts",
}
PROVED = [name for name, (_, label) in BATCH_FIRST.items() if label is None or label[1:2] == ":"]


@pytest.mark.parametrize("name", PROVED)
def test_what_a_graph_proves_eager_mode_knows(name):
    fn, expected = BATCH_FIRST[name]
    label, size = in_python(fn, X, 0), 0 if expected is None else fn(X).shape[int(expected[0])]
    if name in UNKNOWN:
        assert label is None
    elif expected is None or expected.endswith("p"):
        assert label is not None
    else:
        owners = tuple(i // int(expected[2:]) % 3 for i in range(size))
        assert label == Listed(int(expected[0]), owners)


@torch.library.custom_op("lorafx_tests::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    return x.flip(0)


mystery.register_fake(torch.empty_like)


def test_sizes_that_torch_knows_to_be_equal_are_one():
    """s // 2 of a view and (s − 1) // 2 + 1 of a convolution, as in RAFT."""

    def fn(x):
        requests, time, _ = x.shape
        halves = x.view(requests, time // 2, 2, 4)[:, :, 0]
        convolved = F.conv1d(x.mT, x.new_ones(4, 4, 3), stride=2, padding=1).mT
        both = halves + convolved  # here torch guards on it
        return both.flatten(0, 1) + halves.flatten(0, 1) + convolved.flatten(0, 1)

    gm = trace(fn, [torch.randn(3, 6, 4, dtype=torch.float64)])
    label = output_label(label_graph(gm, [Own(0)]), gm)
    assert isinstance(label, Own), label


def test_unknown_operator_is_loud():
    label, _, _ = labelled(lambda x: mystery(x) + 1, [X], [Own(0)])
    assert isinstance(label, Mixed)
    assert "lorafx_tests::mystery: no rule for this operator" in label.reason


SEQUENCE_FIRST = {
    "flat": (lambda x: x.reshape(-1, 4), "0:1"),
    "as_if_batch_first": (lambda x: x.reshape(x.shape[1], x.shape[0], 4).cumsum(1), "mixed"),
    "attention": (
        lambda x: torch.einsum("ibd,jbd->bij", x, x).softmax(-1) @ x.transpose(0, 1),
        "0:1",
    ),
    "mean_time": (lambda x: x.mean(0), "0:1"),
}


@pytest.mark.parametrize("name", SEQUENCE_FIRST)
@pytest.mark.parametrize(("time", "batch"), [(6, 3), (3, 3)])
def test_sequence_first(name, time, batch):
    """T a multiple of B, and T equal to B: what misleads every guess by shape."""
    fn, expected = SEQUENCE_FIRST[name]
    x = torch.randn(time, batch, 4, dtype=torch.float64)
    label, flow, gm = labelled(fn, [x], [Own(1)])
    assert ("mixed" if isinstance(label, Mixed) else rows_of(label)) == expected
    changed = x.clone()
    changed[:, 1] += 1.5
    assert taint(gm, flow, [x], [changed], 1, batch) == []


def route(x: torch.Tensor, k: int = 2):
    """Router and dispatch as mixture-of-experts layers do it, on flat tokens."""
    flat = x.reshape(-1, 4)
    experts = (flat[:, :k] * 10).long().reshape(-1)
    _, p = experts.sort()
    return flat, experts, p, k


def dispatch_inverse(x):
    flat, _, p, k = route(x)
    picked = flat[p // k] @ WEIGHT
    inverse = torch.empty_like(p)
    inverse[p] = torch.arange(p.shape[0])
    return picked[inverse].view(-1, k, 7).sum(1)


def dispatch_index_add(x):
    flat, _, p, k = route(x)
    out = torch.zeros(flat.shape[0], 7, dtype=x.dtype)
    return out.index_add(0, p // k, flat[p // k] @ WEIGHT)


def dispatch_left_sorted(x):
    flat, _, p, k = route(x)
    return flat[p // k] @ WEIGHT


def wrong_inverse(x):
    flat, experts, p, k = route(x)
    other = (experts * 3).sort()[1]
    return flat[p // k][other.argsort()]


DISPATCH = {
    dispatch_inverse: "0:{T}",
    dispatch_index_add: "0:{T}",
    dispatch_left_sorted: "0:2*{T}p",
    wrong_inverse: "mixed",
}


@pytest.mark.parametrize("fn", DISPATCH, ids=lambda fn: fn.__name__)
def test_expert_dispatch(fn):
    label, flow, gm = labelled(fn, [X], [Own(0)])
    time = next(n for n in gm.graph.nodes if n.op == "placeholder").meta["val"].shape[1].node.expr
    expected = DISPATCH[fn].format(T=time)
    assert ("mixed" if isinstance(label, Mixed) else rows_of(label)) == expected
    for request in range(3):
        changed = X.clone()
        changed[request] = X[request].flip(0) * 0.7
        assert taint(gm, flow, [X], [changed], request, 3) == []


def test_embedding_and_masks():
    table = torch.randn(6, 4, dtype=torch.float64)

    def fn(ids, mask):
        x = F.embedding(ids, table)
        b, t = torch.arange(ids.shape[0])[:, None, None, None], torch.arange(ids.shape[1])
        allowed = mask[b, t[None, None, None, :]] & (t[None, :] <= t[:, None])
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=allowed)

    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    label, flow, gm = labelled(fn, [IDS, mask], [Own(0), Own(0)])
    assert rows_of(label) == "0:1"
    changed = IDS.clone()
    changed[2] = IDS[2].flip(0)
    other = mask.clone()
    other[2] = True
    assert taint(gm, flow, [IDS, mask], [changed, other], 2, 3) == []


def test_masks_of_another_layout_disagree():
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    label, _, _ = labelled(
        lambda x, mask: x + mask[:, :, None], [x, x[0, :, :3].clone()], [Own(0), Own(1)], (0, 1)
    )
    assert isinstance(label, Mixed)
    assert "operands disagree" in label.reason


def test_grouped_rows_meet_their_experts():
    weights, bounds = torch.randn(2, 8, 8, dtype=torch.bfloat16), torch.tensor([2, 6]).int()

    def fn(x, bounds):
        return torch._grouped_mm(x, weights, offs=bounds)

    x = ROWS.bfloat16().repeat(1, 2)
    label, _, _ = labelled(fn, [x, bounds], [Own(0), Mixed("counts of everybody's tokens")], (1,))
    assert rows_of(label) == "0:1"


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


def gathered_columns(x, group):
    """As DTensor gathers a dimension that is not the first."""
    ranks = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), 1, group))
    return torch.cat([x, *ranks.split(x.shape[0])], -1)  # a cat of one tensor would be a copy


def gathered_rows(x, group):
    return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), 1, group))


@pytest.mark.parametrize("fn", [reduced, gathered, gathered_columns])
def test_rows_stay_where_they_are(fn, group):
    label, flow, gm = labelled(lambda x: fn(x, group), [X], [Own(0)])
    assert isinstance(label, Own)
    assert (label.dim, label.rows, label.perm) == (0, 1, None)
    changed = X.clone()
    changed[1] += 1.5
    assert taint(gm, flow, [X], [changed], 1, 3) == []


@pytest.mark.parametrize("after", [lambda x: x, lambda x: x.split(len(X))[0]])
def test_rows_of_several_ranks_one_after_another_are_given_up(after, group):
    label, _, _ = labelled(lambda x: after(gathered_rows(x, group)), [X], [Own(0)])
    assert isinstance(label, Mixed)
    assert "gathered along their own dimension" in label.reason
