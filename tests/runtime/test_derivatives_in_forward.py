"""Forwards that compute derivatives, map over rows, or branch by operators: what torch.func and
torch.autograd compute of a module with an adapter is the derivative of W + ΔW, in graphs and in
eager mode; the bodies of torch.cond and its kin are refused by name."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, error
from oracle import merged, save_adapter
from safetensors.torch import load_file, save_file
from slowly import few
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import lorafx
from lorafx.capture import backend
from lorafx.errors import (
    BatchError,
    CaptureError,
    LorafxError,
    MatchError,
    ProvenanceError,
    TargetError,
)

SIZE = 6
NAMES = ["a0", None, "a1"]


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def energy(self, x: Tensor) -> Tensor:
        return (torch.tanh(self.a(x)) * self.b(x)).sum()


class Grad(Energy):
    def forward(self, x: Tensor) -> Any:
        return grad(self.energy)(x)


class Vjp(Energy):
    def forward(self, x: Tensor) -> Any:
        y, pull = vjp(lambda x: torch.tanh(self.a(x)), x)
        return y + pull(torch.ones_like(y))[0]


class Jvp(Energy):
    def forward(self, x: Tensor) -> Any:
        y, tangent = jvp(lambda x: torch.tanh(self.a(x)), (x,), (torch.cos(x),))
        return y + tangent


class Jacobian(Energy):
    def forward(self, x: Tensor) -> Any:
        return vmap(jacrev(lambda row: torch.tanh(self.a(row))))(x)


class Mapped(Energy):
    def forward(self, x: Tensor) -> Any:
        return vmap(lambda row: torch.tanh(self.a(row)) * self.b(row))(x)


class OfWeights(Energy):
    def forward(self, x: Tensor) -> Any:
        def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.as_tensor(functional_call(self.a, weights, (row,))).square().sum()

        weights = dict(self.a.named_parameters())
        return vmap(grad(loss), in_dims=(None, 0))(weights, x)["weight"].flatten(1)


class ForwardMode(Energy):
    def forward(self, x: Tensor) -> Any:
        with forward_ad.dual_level():
            dual = torch.tanh(self.a(forward_ad.make_dual(x, torch.cos(x))))
            primal, tangent = forward_ad.unpack_dual(dual)
            return primal + tangent


class Forces(Energy):
    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            forces = torch.autograd.grad(self.energy(x), x, create_graph=True)[0]
            return torch.autograd.grad(forces.square().sum(), x)[0]


class Backward(Energy):
    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            self.energy(x).backward()
        return x.grad


class Enabled(Energy):
    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            return self.b(torch.tanh(self.a(x)))


class OfFunctional(Energy):
    def forward(self, x: Tensor) -> Any:
        return torch.autograd.functional.jacobian(lambda x: torch.tanh(self.a(x)), x).sum((0, 1))


class MappedHessian(Energy):
    """torch itself does not trace it."""

    def forward(self, x: Tensor) -> Any:
        return vmap(hessian(self.energy))(x)


class Updated(Energy):
    """A weight after a step of training is no W + ΔW."""

    def forward(self, x: Tensor) -> Any:
        weights = dict(self.a.named_parameters())
        step = grad(lambda w: functional_call(self.a, w, (x,)).square().sum())(weights)
        weights = {name: value - 0.1 * step[name] for name, value in weights.items()}
        return functional_call(self.a, weights, (x,))


class Linearized(Energy):
    """make_fx in Python."""

    def forward(self, x: Tensor) -> Any:
        y, tangent = torch.func.linearize(lambda x: torch.tanh(self.a(x)), x)
        return y + tangent(torch.ones_like(x))


def _served(
    kind: type[Energy],
    folder: Path,
    start: str,
    change: Callable[[Any], None] = lambda model: None,
    **adapter: Any,
) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    base = kind().eval()
    folders = {
        f"a{i}": save_adapter(base, folder / f"a{i}", rank=2, targets=["a", "b"], seed=i, **adapter)
        for i in range(2)
    }
    options = {"lowering": "reference", "start": start, "cache": None}
    model = copy.deepcopy(base)
    change(model)
    return base, lorafx.compile(model, adapters=folders, options=options)


def _check(base: nn.Module, cm: Any, folder: Path, names: list[str | None]) -> None:
    torch.manual_seed(1)
    x = torch.randn(len(names), SIZE)
    got = cm(x, adapter_names=names).detach()
    for row, name in enumerate(names):
        alone = base if name is None else merged(base, folder / name)
        want = alone(x[row : row + 1])
        assert error(got[row : row + 1], want.detach()) <= TOLERANCE, (names, row)


BOTH = pytest.mark.parametrize("start", ["compiled", "eager"])
SERVED = (
    *(Grad, Vjp, Jvp, Jacobian, Mapped, OfWeights, ForwardMode, Forces, Backward, Enabled),
    *(OfFunctional,),
)


@BOTH
@pytest.mark.parametrize("kind", few(SERVED, Grad, Jvp, OfWeights, Forces, OfFunctional))
@pytest.mark.filterwarnings("ignore")
def test_each_row_has_its_adapters_derivative(
    kind: type[Energy], start: str, tmp_path: Path
) -> None:
    base, cm = _served(kind, tmp_path, start)
    if kind is OfFunctional and start == "compiled":  # Dynamo breaks the graph there
        with pytest.raises(CaptureError, match=r"derivatives by torch\.autograd of what a graph"):
            _check(base, cm, tmp_path, ["a0"] * 3)
        return
    for names in (NAMES, ["a0"] * 3, [None] * 3):
        _check(base, cm, tmp_path, names)


@pytest.mark.parametrize(
    ("kind", "start"),
    few(
        [
            (MappedHessian, "eager"),
            pytest.param(
                MappedHessian, "compiled", marks=pytest.mark.slow
            ),  # of torch's own refusal
            *((kind, start) for kind in (Updated, Linearized) for start in ("compiled", "eager")),
        ],
        Updated,
    ),
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_served_is_refused_by_name(
    kind: type[Energy], start: str, tmp_path: Path
) -> None:
    base, cm = _served(kind, tmp_path, start)
    for names in (NAMES, ["a0"] * 3):
        with pytest.raises(LorafxError) as caught:
            cm(torch.randn(3, SIZE), adapter_names=names)
        if kind is Updated and isinstance(caught.value, CaptureError):  # torch failed on it first
            assert "AOTAutograd failed on a graph of Updated" in str(caught.value)
            continue
        assert isinstance(caught.value, (MatchError, ProvenanceError))
        assert any(word in str(caught.value) for word in ("torch.func", "no rule for aten.sub"))
    if kind is Linearized:
        _check(base, cm, tmp_path, [None] * 3)
    del caught
    gc.collect()  # of guards that torch keeps in frames of errors, which put back what they found
    assert torch.ones(1, requires_grad=True).square().requires_grad


def _with_other_biases(folder: Path) -> None:
    """Give the adapters biases that differ from the base's: PEFT saves copies of it."""
    for number in range(2):
        file = folder / f"a{number}" / "adapter_model.safetensors"
        state = load_file(file)
        biases = {key: value for key, value in state.items() if key.endswith(".bias")}
        assert biases
        generator = torch.Generator().manual_seed(number)
        drawn = {key: torch.randn(b.shape, generator=generator) for key, b in biases.items()}
        save_file({**state, **drawn}, file, metadata={"format": "pt"})


@BOTH
@pytest.mark.parametrize("adapter", [{"bias": "lora_only"}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("kind", few([Jvp, ForwardMode], Jvp))
def test_the_tangent_of_an_adapter_with_a_bias_has_none(
    kind: type[Energy], adapter: dict[str, Any], start: str, tmp_path: Path
) -> None:
    base, cm = _served(kind, tmp_path, start, **adapter)
    _with_other_biases(tmp_path)
    for number in range(2):
        cm.load_adapter(tmp_path / f"a{number}", f"a{number}")
    _check(base, cm, tmp_path, NAMES)


class Unbiased(Jvp):
    def __init__(self) -> None:
        super().__init__()
        for name in "ab":
            self.add_module(name, nn.Linear(SIZE, SIZE, bias=False))


@BOTH
def test_a_bias_without_one_in_the_base_is_refused_beside_a_tangent(
    start: str, tmp_path: Path
) -> None:
    """It would be added to the product's derivative, too."""
    base, cm = _served(Unbiased, tmp_path, start, lora_bias=True)
    with pytest.raises(MatchError, match="adapter adds at a cannot be applied: its module has no"):
        _check(base, cm, tmp_path, NAMES)
    _check(base, cm, tmp_path, [None] * 3)


def test_a_tangent_is_scaled_by_dora(tmp_path: Path) -> None:
    base, cm = _served(Jvp, tmp_path, "compiled", use_dora=True)
    _check(base, cm, tmp_path, NAMES)


@pytest.mark.parametrize("adapter", [{"use_dora": True}, {"bias": "lora_only"}])
def test_products_with_the_transposed_weight_take_factors_alone(
    adapter: dict[str, Any], tmp_path: Path
) -> None:
    base, cm = _served(Vjp, tmp_path, "compiled", **adapter)
    with pytest.raises(MatchError, match="its weight is used in blocks"):
        _check(base, cm, tmp_path, NAMES)


class Branches(Energy):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flag", torch.ones(1))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        first = torch.cond(self.flag.sum() > 0, lambda x: self.a(x).tanh(), lambda x: -x, (x,))
        return self.b(first)


class Loop(Branches):
    def forward(self, x: Tensor) -> Any:
        def body(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, torch.tanh(self.a(x))

        start = torch.zeros((), dtype=torch.int64), x
        return while_loop(lambda i, x: i < 3, body, start)[1]


@BOTH
@pytest.mark.parametrize("kind", few([Branches, Loop], Branches))
@pytest.mark.filterwarnings("ignore")
def test_a_site_in_the_body_of_an_operator_is_refused(
    kind: type[Energy], start: str, tmp_path: Path
) -> None:
    base, cm = _served(kind, tmp_path, start)
    with pytest.raises(MatchError, match=r"no rule for (cond|while_loop)"):
        _check(base, cm, tmp_path, NAMES)
    _check(base, cm, tmp_path, [None] * 3)


class WithParts(Energy):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE))
        self.product: Any = _product

    def forward(self, x: Tensor) -> Any:
        return self.b(self.part(torch.tanh(self.product(x, self.a.weight))))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def _script_module(model: Any) -> None:
    model.part = torch.jit.script(model.part)


def _script_function(model: Any) -> None:
    model.product = torch.jit.script(_product)


@BOTH
@pytest.mark.parametrize("change", [_script_module, _script_function])
@pytest.mark.filterwarnings("ignore")
def test_parts_of_torch_jit_are_served_around(
    change: Callable[[Any], None], start: str, tmp_path: Path
) -> None:
    base, cm = _served(WithParts, tmp_path, start, change)
    for names in ([None] * 3, ["a0"] * 3):
        _check(base, cm, tmp_path, names)
    if change is _script_function:
        _check(base, cm, tmp_path, NAMES)


@pytest.mark.filterwarnings("ignore")
def test_a_module_of_torch_jit_is_refused(tmp_path: Path) -> None:
    model = WithParts().eval()
    _script_module(model)
    with pytest.raises(TargetError, match=r"part\.1 .*: torch\.jit compiled it"):
        lorafx.compile(model, lorafx.LoraConfig(target_modules=["part.1"]))


@BOTH
def test_nested_tensors_are_refused_with_adapters(start: str, tmp_path: Path) -> None:
    _, cm = _served(Enabled, tmp_path, start)
    rows = torch.nested.nested_tensor(
        [torch.ones(2, SIZE), torch.ones(1, SIZE)], layout=torch.jagged
    )
    with pytest.raises(BatchError, match=r"x is a nested tensor.*pad"):
        cm(rows, adapter_names=["a0", "a1"])


def test_a_trace_that_fails_leaves_hooks_of_saved_tensors_enabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a trainer's checkpoints of activations fail in this thread from then on."""
    _, cm = _served(Grad, tmp_path, "compiled")

    def failing(**settings: Any) -> Any:
        def run(gm: Any, examples: Any) -> Any:
            torch._C._autograd._saved_tensors_hooks_disable("as a graph does at its beginning")
            raise RuntimeError("in the middle")

        return run

    monkeypatch.setattr(backend, "aot_autograd", failing)
    with pytest.raises(LorafxError, match="in the middle"):
        cm(torch.randn(3, SIZE), adapter_names=NAMES)
    assert torch._C._autograd._saved_tensors_hooks_is_enabled()
