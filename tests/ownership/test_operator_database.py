"""The rules on torch's own samples of its operators (OpInfo), in eager mode, against taint.

The entries of a sample's first tensor along a dimension are requests, or those of all tensors of
the same size there. Each request's entries are replaced in turn by its neighbour's, which keeps
values valid. No element may move that a label gives to another request; and where each element
moves with one request at most, along the first dimension, there should be a label: `UNKNOWN` lists
the operators without one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves, tree_map

from lorafx.eager.following import Following
from lorafx.ownership.memory import Memory
from lorafx.ownership.real_labels import RealLabel, cells_of, listed

SAMPLES, MOST_ELEMENTS, MOST_REQUESTS = 3, 4_000, 5
#: The operators without a label for some sample, by reason.
UNKNOWN = {
    "works along the requests; the sample's elements are apart by chance": (
        "__getitem__", "block_diag", "diag", "diagflat", "diagonal_copy", "index_add",
        "index_fill", "lu_unpack", "masked.amax", "masked.norm", "native_group_norm",
        "native_layer_norm", "nextafter", "nn.functional.conv1d", "nn.functional.conv2d",
        "nn.functional.conv3d", "nn.functional.conv_transpose1d",
        "nn.functional.conv_transpose2d", "nn.functional.conv_transpose3d", "triangular_solve",
        "unfold_copy", "unique_consecutive", "view_as_complex",
    ),
    "a derivative, a loss, or an update of statistics": (
        "_native_batch_norm_legit", "_softmax_backward_data", "max_pool2d_with_indices_backward",
        "nn.functional.linear_cross_entropy",
    ),
    "no model is known whose forward calls it": (
        "_chunk_cat", "_segment_reduce", "_unsafe_masked_index",
        "_unsafe_masked_index_put_accumulate", "as_strided_scatter", "diagonal_scatter",
        "hash_tensor", "nn.functional.rrelu", "put", "resize_", "resize_as_", "sparse.mm",
    ),
    "a tensor that is made of Python's numbers may hold requests' values": ("unravel_index",),
    "parts of uninitialised memory are copied": ("nn.functional.pad",),
}  # fmt: skip
#: Operators whose label follows the values of indices: the order of rows is no content of theirs.
BY_VALUES = ("index_add", "index_copy", "index_put", "masked_scatter", "put", "scatter")


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def copied(values: Any) -> Any:
    return tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, values)


def results(op: Any, call: Any) -> list[Tensor]:
    # `torch.manual_seed` queues, on a machine without a GPU, a call for each kind of device.
    torch.default_generator.manual_seed(0)
    random.seed(0)
    with torch.no_grad():
        return tensors(op(call[0], *call[1], **call[2]))


def owned(call: Any) -> Iterator[dict[int, int]]:
    """Which tensors hold requests -> along which dimension."""
    inputs = tensors(call)
    for dim, size in enumerate(inputs[0].shape[:2] if inputs else ()):
        if 2 <= size <= MOST_REQUESTS:
            alike = {i: dim for i, t in enumerate(inputs) if t.shape[dim : dim + 1] == (size,)}
            yield {0: dim}
            if len(alike) > 1 and dim == 0:
                yield alike


def moved(a: Tensor, b: Tensor) -> Tensor:
    if a.is_complex():
        return moved(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b)).any(-1)
    if not a.is_floating_point():
        return a != b
    return ~torch.isclose(a.double(), b.double(), rtol=1e-5, atol=1e-5, equal_nan=True)


def with_neighbours(call: Any, dims: dict[int, int], request: int) -> Any:
    call = copied(call)
    inputs = tensors(call)
    for i, dim in dims.items():
        part = inputs[i].select(dim, (request + 1) % inputs[i].shape[dim]).clone()
        inputs[i].select(dim, request).copy_(part)
    return call


def labels_of(op: Any, call: Any, dims: dict[int, int]) -> tuple[list[Tensor], list[Any]]:
    call, memory = copied(call), Memory()
    for i, tensor in enumerate(tensors(call)):
        if i in dims:
            memory.note(tensor, listed(dims[i], tuple(range(tensor.shape[dims[i]]))))
        else:
            memory.add_shared([tensor])
    with Following(memory) as following:
        found = results(op, call)
        return found, [following.label(tensor) for tensor in found]


def judged(op: Any, call: Any, dims: dict[int, int]) -> tuple[list[str], bool]:
    """Labels that are contradicted, and whether one is missing."""
    i, dim = next(iter(dims.items()))
    requests = range(tensors(call)[i].shape[dim])
    before = results(op, copied(call))
    after = [results(op, with_neighbours(call, dims, request)) for request in requests]
    if any([t.shape for t in run] != [t.shape for t in before] for run in after):
        return [], False  # sizes that depend on data
    wrong: list[str] = []
    missing = False
    for k, (result, label) in enumerate(zip(*labels_of(op, call, dims), strict=True)):
        if not result.numel():
            continue
        moves = torch.stack([moved(before[k], run[k]) for run in after])
        if label is None:
            apart = bool((moves.sum(0) <= 1).all()) and bool(moves.flatten(1).any(1).all())
            missing |= apart and dim == 0
        elif contradicted(label, moves):
            wrong.append(f"{dims} of {[tuple(t.shape) for t in tensors(call)]}: {label}")
    return wrong, missing


def contradicted(label: RealLabel, moves: Tensor) -> bool:
    cells = cells_of(label, moves.dim() - 1, moves.device).expand(moves.shape[1:])
    return any(bool((move & (cells != request)).any()) for request, move in enumerate(moves))


def samples_of(op: Any) -> list[Any]:
    # By the function: `op.sample_inputs` looks at the source of every caller, ten times as long.
    dtype = next((t for t in (torch.float64, torch.float32) if t in op.dtypes), torch.int64)
    samples = list(op.sample_inputs_func(op, "cpu", dtype, False))
    kept = samples[: SAMPLES // 2] + samples[SAMPLES // 2 :: max(len(samples) // 2, 1)]
    calls = [(sample.input, sample.args, sample.kwargs) for sample in kept[:SAMPLES]]
    return [call for call in calls if sum(t.numel() for t in tensors(call)) <= MOST_ELEMENTS]


@pytest.mark.filterwarnings("ignore")
def test_labels_of_torchs_samples() -> None:
    wrong: dict[str, list[str]] = {}
    missing: set[str] = set()
    judgements = 0
    torch.default_generator.manual_seed(0)
    for op in op_db:
        if op.name.startswith("jiterator"):
            continue
        try:
            calls = samples_of(op)
        except RuntimeError:
            continue  # needs another device
        for call in calls:
            for dims in owned(call):
                indices = all(not tensors(call)[i].is_floating_point() for i in dims)
                if op.name in BY_VALUES and indices:
                    continue
                try:
                    contradictions, lost = judged(op, call, dims)
                except (RuntimeError, ValueError, IndexError, TypeError):
                    continue  # the changed values or the number of runs do not suit it
                judgements += 1
                wrong.setdefault(op.name, []).extend(contradictions)
                if lost:
                    missing.add(op.name)
    assert judgements > 1000
    assert {name: found for name, found in wrong.items() if found} == {}
    known = {name for names in UNKNOWN.values() for name in names}
    assert sorted(missing - known) == [], "operators without a rule"
    assert not known - {op.name for op in op_db}
