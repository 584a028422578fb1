"""Forms against the numbers themselves: a form says of each entry which entry of W it is."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lorafx.program.weight_forms import (
    FIXED,
    WeightForm,
    copied_form,
)

pytestmark = pytest.mark.quick

N, K = 12, 10
#: Each entry of W (N, K) is its own place.
PLACES = torch.arange(N * K).view(N, K)


def entries(form: WeightForm, shape: tuple[int, ...]) -> Tensor:
    """The places that `form` says a tensor of this shape holds."""
    out, into = torch.tensor(form.out), torch.tensor(form.into)
    for axis, size in zip(form.axes, shape, strict=True):
        index = torch.arange(size) % (axis.period or size)
        out, into = out[..., None] + index * axis.out, into[..., None] + index * axis.into
    assert bool((out < N).all() and (into < K).all())
    return out * K + into


def some_shape(rng: random.Random, count: int) -> tuple[int, ...]:
    shape: list[int] = []
    while count > 1:
        factor = rng.choice([d for d in range(2, count + 1) if count % d == 0])
        shape.append(factor)
        count //= factor
    return tuple(shape + [1] * rng.randint(0, 1))


def step(rng: random.Random, tensor: Tensor, form: WeightForm) -> tuple[Tensor, WeightForm | None]:
    """One random view of the tensor and of its form."""
    dims = tensor.dim()
    kind = rng.choice(["view", "permute", "slice", "select", "expand"])
    if kind == "view":
        shape = some_shape(rng, tensor.numel())
        return tensor.reshape(shape), form.reshaped(tensor.shape, shape)
    if kind == "permute":
        order = rng.sample(range(dims), dims)
        return tensor.permute(order), form.permuted(order)
    if kind == "expand":
        wide = tensor.expand(rng.randint(1, 3), *tensor.shape)
        return wide, form._replace(axes=(FIXED, *form.axes))
    dim = rng.randrange(dims)
    size = tensor.shape[dim]
    if kind == "select":
        index = rng.randrange(size)
        return tensor.select(dim, index), form.selected(dim, index)
    start, stride = rng.randrange(size), rng.randint(1, 2)
    index = torch.arange(start, size, stride)
    return tensor.index_select(dim, index), form.sliced(dim, start, stride)


@pytest.mark.parametrize("seed", range(6))
def test_views_and_their_forms_agree(seed: int) -> None:
    rng, followed = random.Random(seed), 0
    for _ in range(100):
        transposed = rng.random() < 0.5
        tensor, form = (
            PLACES.T if transposed else PLACES,
            WeightForm.of_weight(transposed=transposed),
        )
        for _ in range(rng.randint(1, 6)):
            tensor, after = step(rng, tensor, form)
            if after is None or tensor.dim() == 0:
                break
            form = after
            assert torch.equal(entries(form, tensor.shape), tensor)
            followed += 1
    assert followed > 50


def test_forms_by_value() -> None:
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    blocks = weight.view(3, 4, K)
    for copy in (
        blocks[:, :3].clone(),
        blocks[:, 3:].clone(),
        blocks.permute(1, 2, 0).clone(),
        weight[1::2].clone(),
        weight.T.clone(),
    ):
        form = copied_form(copy, weight)
        assert form is not None
        assert torch.equal(weight.flatten()[entries(form, copy.shape)], copy)
    assert copied_form(blocks[[2, 0, 1]], weight) is None
    assert copied_form(weight * 2, weight) is None
    assert copied_form(torch.randn(3, K), weight) is None
    changed = blocks.clone()
    changed[2, 3, 4] += 1
    assert copied_form(changed, weight) is None
