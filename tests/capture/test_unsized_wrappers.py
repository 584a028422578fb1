"""AOTAutograd's wrappers of tensors spare the arithmetic of how many bytes their memory has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_merge import Case, check_mixed
from tiny_models import FAMILIES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from lorafx.compat import ENOUGH_BYTES, unsized_wrappers

MAKE = "_make_wrapper_subclass"


def wrapped() -> Tensor:
    """A wrapper of a tensor [s, 5], s a symbol."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = mode.from_tensor(torch.zeros(3, 5), symbolic_context=sizes)
    with FunctionalTensorMode():
        return FunctionalTensor.to_functional(fake)


@pytest.mark.quick
def test_a_wrapper_is_the_same_but_for_its_bytes() -> None:
    one = wrapped()
    with unsized_wrappers(), unsized_wrappers():
        other = wrapped()
    assert MAKE not in vars(torch.Tensor)
    assert str(other.shape) == str(one.shape)
    assert (str(other.stride()), other.storage_offset()) == ("(5, 1)", one.storage_offset())
    assert (other.dtype, other.device, other.layout) == (one.dtype, one.device, one.layout)
    assert str(one.untyped_storage().nbytes()) == f"20*{one.shape[0]}"
    assert other.untyped_storage().nbytes() == ENOUGH_BYTES


class Pooled(nn.Module):
    """Its pooling lays out what it gives by `as_strided_`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.up(x).transpose(1, 2)
        return {"logits": torch.adaptive_avg_pool1d(h, 1).flatten(1)}


def test_memory_that_is_laid_out_anew(small) -> None:
    torch.manual_seed(0)
    case: Case = small(Pooled, ["up"])
    cm: Any = case.compile(dynamic=True)
    for rows, length in ((3, 4), (2, 5)):
        check_mixed(cm, case, ["a", None, "b"][:rows], {"x": torch.randn(rows, length, 6)})
    assert cm.recompiles == 1


class Other(Tensor):
    """A wrapper of a user's own."""

    @staticmethod
    def __new__(cls, inner: Tensor, **sizes: Any) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, **sizes)

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


@pytest.mark.quick
def test_wrappers_of_others_are_what_they_were() -> None:
    inner = torch.zeros(3, 5)
    with unsized_wrappers():
        assert Other(inner).untyped_storage().nbytes() == 60
        assert Other(inner, strides=(5, 1), storage_size=80).untyped_storage().nbytes() == 80


@pytest.mark.quick
def test_an_error_puts_back_how_they_are_made() -> None:
    with pytest.raises(KeyError), unsized_wrappers():
        raise KeyError
    assert MAKE not in vars(torch.Tensor)


def test_a_capture_makes_them_so(plain: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[Any] = []
    make: Callable[..., Tensor] = FunctionalTensor.__new__

    def noted(cls: Any, elem: Tensor, mode: Any) -> Tensor:
        made = make(cls, elem, mode)
        sizes.append(made.untyped_storage().nbytes())
        return made

    monkeypatch.setattr(FunctionalTensor, "__new__", noted)
    torch.manual_seed(0)
    cm: Any = plain.compile(dynamic=True)
    for rows, length in ((3, 4), (5, 6)):
        names = ["a1", None, "a3", "a0", "a1"][:rows]
        check_mixed(cm, plain, names, FAMILIES["plain"].inputs(rows, length))
    assert cm.recompiles == 1
    assert sizes
    assert set(sizes) == {ENOUGH_BYTES}
