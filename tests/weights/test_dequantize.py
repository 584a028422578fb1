"""`lorafx.dequantize` and putting weights back: every holder of a weight, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_integers import AwqLinear, GptqLinear, PackedLinear
from quantised import KINDS, int8_products_saturate
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafx
from lorafx.model.quantized import requantize, stored

K, N = 64, 96


class Named(nn.Module):
    """One linear under a name that the kinds quantise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(K, N)


@pytest.fixture
def registered() -> Any:
    lorafx.register(GptqLinear, dequantize=PackedLinear.dequantized, requantize=PackedLinear.store)
    lorafx.register(AwqLinear, dequantize=PackedLinear.dequantized)
    yield
    lorafx.unregister(GptqLinear)
    lorafx.unregister(AwqLinear)


def quantised(kind: str) -> tuple[Tensor, nn.Module]:
    """W before, and the module that holds it quantised."""
    torch.manual_seed(0)
    model = Named()
    dense = model.inner.weight.detach().clone()
    KINDS[kind][0](model)
    return dense, model.inner.eval().requires_grad_(False)


def multiplies_by_it(kind: str) -> bool:
    """Whether the kernel's product is that of the weight that it holds."""
    return kind != "torchao-int8-dynamic" or not int8_products_saturate()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("registered")
def test_reads_what_the_kernel_multiplies_by(kind: str) -> None:
    """Also after the first call, in which libraries move or repack what they hold."""
    dense, module = quantised(kind)
    x = torch.randn(5, K)
    module(x)
    found = lorafx.dequantize(module)
    assert found.shape == (N, K)
    assert found.is_floating_point()
    # A quarter of the largest weight: the widest gap between two values of a 4-bit code.
    assert (found.float() - dense).abs().max() <= 0.25 * dense.abs().max()
    y = module(x)
    rounds = 1e-5 if KINDS[kind][1] == 1e-5 else 0.02
    want = x @ found.float().T + module.bias
    if multiplies_by_it(kind):
        assert (y - want).abs().max() <= rounds * want.abs().max()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "awq" and "torchao" not in k])
@pytest.mark.usefixtures("registered")
def test_writes_in_place_and_restores_bit_by_bit(kind: str) -> None:
    _, module = quantised(kind)
    x = torch.randn(5, K)
    _, restore = stored(module)  # before the first call: some formats are repacked in it
    read = lorafx.dequantize(module)
    before = module(x)
    addresses = {name: p.data_ptr() for name, p in module.named_parameters()}
    other = read.float() + 0.05 * torch.randn(N, K)
    error = requantize(module, other)
    found = lorafx.dequantize(module).float()
    measured = float((found - other).abs().max() / other.abs().max())
    assert error == pytest.approx(measured)
    assert error <= 0.2
    want = x @ found.T + module.bias
    if multiplies_by_it(kind):
        assert (module(x) - want).abs().max() <= max(KINDS[kind][1], 1e-5) * want.abs().max()
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == addresses
    restore()
    assert torch.equal(lorafx.dequantize(module), read)
    assert torch.equal(module(x), before)


def test_plain_weights() -> None:
    """As numbers (N, K) whichever way round they lie; an embedding's are (V, D)."""
    linear, turned, table = nn.Linear(K, N), Conv1D(N, K), nn.Embedding(7, 5)
    assert torch.equal(lorafx.dequantize(linear), linear.weight)
    assert torch.equal(lorafx.dequantize(turned), turned.weight.T)
    assert torch.equal(lorafx.dequantize(table), table.weight)
    assert requantize(turned, torch.ones(N, K)) == 0
    assert torch.equal(turned.weight, torch.ones(K, N))


def test_fine_grained_fp8() -> None:
    """transformers' own: a scale for each block, or one for all; its kernels need a GPU."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    linear = fp8.FP8Linear(K, N, block_size=(32, 16))
    scales = torch.rand(3, 4) + 0.5
    numbers = torch.randn(N, K).to(torch.float8_e4m3fn)
    linear.weight = nn.Parameter(numbers, requires_grad=False)
    linear.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
    wide = scales.repeat_interleave(32, 0).repeat_interleave(16, 1)
    assert torch.equal(lorafx.dequantize(linear), numbers.float() * wide)
    linear.weight_scale_inv = nn.Parameter(torch.tensor(0.5), requires_grad=False)
    assert torch.equal(lorafx.dequantize(linear), numbers.float() * 0.5)
    with pytest.raises(lorafx.ConfigError, match=r"FP8Linear cannot hold another weight"):
        requantize(linear, torch.randn(N, K))


class Unknown(nn.Linear):
    """Integers whose scale nobody knows."""

    def __init__(self) -> None:
        super().__init__(K, N)
        numbers = torch.ones(N, K, dtype=torch.int8)
        self.weight = nn.Parameter(numbers, requires_grad=False)


@pytest.mark.usefixtures("registered")
def test_what_cannot_be_read_or_written_is_named() -> None:
    with pytest.raises(
        lorafx.ConfigError, match=r"Unknown, which holds Parameter \(96, 64\) torch\.int8"
    ):
        lorafx.dequantize(Unknown())
    with pytest.raises(lorafx.ConfigError, match=r"lorafx\.register\(cls, dequantize="):
        lorafx.dequantize(Unknown())
    with pytest.raises(lorafx.ConfigError, match=r"`weight` of torch.*ReLU, which does not exist"):
        lorafx.dequantize(nn.ReLU())
    for kind in ("torchao-int8", "torchao-fp8"):
        _, module = quantised(kind)
        with pytest.raises(lorafx.ConfigError, match="cannot hold another weight"):
            requantize(module, torch.randn(N, K))
    _, awq = quantised("awq")
    before = awq.qweight.clone()
    with pytest.raises(lorafx.ConfigError, match=r"AwqLinear cannot hold .*requantize="):
        requantize(awq, torch.randn(N, K))
    assert torch.equal(awq.qweight, before)
    with pytest.raises(lorafx.ConfigError, match=r"is \(96, 64\), got \(64, 96\)"):
        requantize(awq, torch.randn(K, N))
    lorafx.register(Unknown, dequantize=lambda module: module.weight.float().T)
    try:
        with pytest.raises(
            lorafx.ConfigError, match=r"\(64, 96\), but its class declares \(96, 64\)"
        ):
            lorafx.dequantize(Unknown())
    finally:
        lorafx.unregister(Unknown)
    with pytest.raises(lorafx.ConfigError, match="dequantize=3 cannot be called"):
        lorafx.register(Unknown, dequantize=3)  # type: ignore[arg-type]
