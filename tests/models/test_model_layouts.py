"""Models whose weights and activations are not contiguous: right results, no hidden copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense_merge import Case, case_by_targets, error
from layouts import LAYOUTS, elements_apart, last_first, row_stride, rows_apart
from torch import Tensor, nn

import lorafx


class Layouts(nn.Module):
    """x that is transposed, expanded and sliced on its way to siblings and to lone linears."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(64, 48)
        self.k = nn.Linear(64, 32)
        self.v = nn.Linear(64, 64, bias=False)
        self.flat = nn.Linear(64, 24)
        self.head = nn.Linear(40, 56)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        turned = x.transpose(1, 2)  # (B, K, T)
        back = turned.contiguous().transpose(1, 2)  # values of x, stored (B, K, T)
        y = torch.cat([self.q(back), self.k(back), F.linear(back, self.v.weight)], -1)
        first = x[:, :1].expand(x.shape)
        y = torch.cat([y, self.flat(first)], -1)
        return {"logits": self.head(y[..., 8:168:4])}


def lay_out(model: Layouts) -> Layouts:
    """Weights column by column, in a larger buffer, and every other element of one."""
    layouts = {"q": last_first, "k": row_stride, "v": elements_apart, "flat": rows_apart}
    for name, lay in layouts.items():
        linear = model.get_submodule(name)
        linear.weight = nn.Parameter(lay(linear.weight.detach()), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(elements_apart(linear.bias.detach()), requires_grad=False)
    return model


@pytest.fixture(scope="module")
def strided_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    base = Layouts().eval().requires_grad_(False)
    folder = tmp_path_factory.mktemp("layouts")
    return case_by_targets(base, folder, dict.fromkeys("ab", "all-linear"))


@pytest.mark.parametrize(
    "lowering",
    ["reference", *(pytest.param(n, marks=pytest.mark.slow) for n in ("inductor", "triton"))],
)
def test_models_of_strided_weights_and_activations(strided_case: Case, lowering: str) -> None:
    model = lay_out(strided_case.model())
    strides = {name: p.stride() for name, p in model.named_parameters()}
    options = {"lowering": lowering}
    dynamic = lowering == "reference"
    cm = lorafx.compile(model, strided_case.folders, options=options, dynamic=dynamic)
    assert {name: p.stride() for name, p in model.named_parameters()} == strides
    torch.manual_seed(1)
    names = ["a", None, "b", "a"]
    layouts = ("last first", "first two swapped")[: 2 if lowering == "reference" else 1]
    for layout in layouts:
        x = LAYOUTS[layout](torch.randn(4, 6, 64))
        got = cm(x=x, adapter_names=names)["logits"]
        assert error(got, strided_case.expected(names, {"x": x})) <= 1e-5
