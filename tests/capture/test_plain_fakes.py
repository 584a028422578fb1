"""Fake tensors of weights are those that torch makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.meta_utils import MetaConverter
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    RelaxedUnspecConstraint,
    ShapeEnv,
    StatelessSymbolicContext,
)

from lorafx.capture.plain_fakes import plain_fakes

pytestmark = pytest.mark.quick


def fakes(tensors: Sequence[Tensor], size: DimDynamic = DimDynamic.STATIC) -> list[FakeTensor]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    made = []
    for number, tensor in enumerate(tensors):
        context: Any = StatelessSymbolicContext(dynamic_sizes=[size] * tensor.dim())
        source = ConstantSource(f"tensor{number}")
        made.append(mode.from_tensor(tensor, source=source, symbolic_context=context))
        assert mode.from_tensor(tensor) is made[-1]
    return made


def properties(fake: FakeTensor) -> dict[str, Any]:
    return {
        "type": type(fake),
        "is": (isinstance(fake, nn.Parameter), isinstance(fake, nn.Buffer)),
        "layout": (fake.shape, fake.stride(), fake.storage_offset(), fake.layout, fake.dtype),
        "device": fake.device,
        "flags": (fake.is_conj(), fake.is_neg(), fake.is_inference(), fake._is_view()),
        "gradient": (fake.requires_grad, fake.is_leaf, fake.is_leaf and fake.grad is None),
        "keys": str(torch._C._dispatch_keys(fake)),
        "item": str(fake.item_memo),
    }


def sharing(tensors: Sequence[Tensor]) -> list[list[bool]]:
    places = [tensor.untyped_storage()._cdata for tensor in tensors]
    return [[one == other for other in places] for one in places]


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of what is described to make its fake tensor."""
    shapes: list[tuple[int, ...]] = []
    make = MetaConverter.meta_tensor

    def making(self: Any, description: Any, *args: Any, **named: Any) -> Any:
        shapes.append(tuple(description.size))
        return make(self, description, *args, **named)

    monkeypatch.setattr(MetaConverter, "meta_tensor", making)
    return shapes


def plain_tensors() -> list[Tensor]:
    merged = nn.Parameter(torch.randn(6, 4), requires_grad=False)
    parts = [nn.Parameter(merged.data[i : i + 2], requires_grad=False) for i in (2, 0, 4)]
    return [
        torch.randn(3, 4),
        torch.randn(2, 3, 4).permute(2, 0, 1).detach(),
        nn.Parameter(torch.randn(5)),
        nn.Parameter(torch.randn(5, dtype=torch.bfloat16), requires_grad=False),
        torch.zeros((), dtype=torch.int64),
        *parts,  # the first of them not at the beginning of their memory
        merged,
        torch.empty_strided((3, 2), (4, 1)),
    ]


@pytest.mark.parametrize("inference", [False, True])
def test_plain_tensors_have_the_fakes_that_torch_makes(described, inference) -> None:
    tensors = plain_tensors()
    with torch.inference_mode(inference):
        want = fakes(tensors)
        described.clear()
        with plain_fakes():
            got = fakes(tensors)
    assert not described
    assert [*map(properties, got)] == [*map(properties, want)]
    assert sharing(got) == sharing(want) == sharing(tensors)


def other_tensors() -> list[Tensor]:
    base = torch.randn(4, 4)
    with_gradient = nn.Parameter(torch.randn(3))
    with_gradient.grad = torch.ones(3)
    with torch.inference_mode():
        inferred = torch.randn(3)
    return [
        inferred,
        base[1:],
        (nn.Parameter(torch.randn(3)) * 2),
        with_gradient,
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3).to_sparse(),
        nn.Buffer(torch.randn(3)),
        torch.empty(0, 3),
    ]


def test_others_are_torchs_to_make(described) -> None:
    want = fakes(other_tensors())
    with plain_fakes():
        for number, tensor in enumerate(other_tensors()):
            described.clear()
            (got,) = fakes([tensor])
            assert described
            if not tensor.is_sparse:
                assert properties(got) == properties(want[number])


def test_sizes_that_may_change_are_symbols(described) -> None:
    with plain_fakes():
        (fake,) = fakes([torch.randn(3, 4)], DimDynamic.DYNAMIC)
        assert described
        assert all(isinstance(size, torch.SymInt) for size in fake.shape)
        described.clear()
        mode = FakeTensorMode(shape_env=ShapeEnv())
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.STATIC],
            constraint_sizes=[RelaxedUnspecConstraint(warn_only=True)],
        )
        mode.from_tensor(torch.randn(3), source=ConstantSource("x"), symbolic_context=context)
        assert described


def test_tensors_of_functorch_are_torchs_to_make(described) -> None:
    def inside(x: Tensor) -> Tensor:
        described.clear()
        with plain_fakes():
            fakes([torch.zeros(3)])
        assert described
        return x

    torch.func.vmap(inside)(torch.randn(2))


def test_torchs_own_is_back_afterwards() -> None:
    own = MetaConverter.__call__
    with plain_fakes():
        assert MetaConverter.__call__ is not own
        with pytest.raises(KeyError), plain_fakes():
            raise KeyError
        assert MetaConverter.__call__ is not own
    assert MetaConverter.__call__ is own
