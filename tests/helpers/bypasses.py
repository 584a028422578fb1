"""Models that use a linear's weight past its module: copies made before compiling, numpy, hooks,
threads, functions that are compiled or scripted, parametrisations.

`Past.prepare` changes a model before it is compiled, and the merged models of the oracle alike.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dense_merge import REFERENCE, Case, error
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import lorafx

K, N = 16, 24
BATCHES = (["a", None, "b", "a"], ["a"] * 4, ["b"])
POOL = ThreadPoolExecutor(1)


class Past(nn.Module):
    """x → tanh(first(x)) → `use`, which stands for w."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.w = nn.Linear(K, K), nn.Linear(K, N)

    def prepare(self) -> None:
        pass

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.use(torch.tanh(self.first(x)))}

    def use(self, h: Tensor) -> Tensor:
        return self.w(h)

    @property
    def copied(self) -> Tensor:
        return self.w.weight.detach().clone()


def past(
    use: Callable[[Any, Tensor], Tensor] | None = None,
    prepare: Callable[[Any], object] = lambda model: None,
) -> type[Past]:
    """The class of models with these methods."""
    return type("Past", (Past,), {"use": use or Past.use, "prepare": lambda self: prepare(self)})


def by_function(model: Any, h: Tensor) -> Tensor:
    return F.linear(h, model.w.weight, model.w.bias)


class Inner(nn.Module):
    def __init__(self, w: nn.Linear) -> None:
        super().__init__()
        self.w = w

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.w.weight, self.w.bias)


def exported(model: Any) -> None:
    batch = {0: torch.export.Dim("batch", min=2)}
    example = (torch.zeros(4, 3, K),)
    model.f = torch.export.export(Inner(model.w), example, dynamic_shapes=(batch,)).module()


def closed_over(model: Any) -> None:
    held, bias = model.copied, model.w.bias
    model.f = lambda h: F.linear(h, held, bias)


def defaulted(model: Any) -> None:
    model.f = lambda h, held=model.copied, bias=model.w.bias: F.linear(h, held, bias)


def compiled(model: Any, **settings: Any) -> None:
    model.f = torch.compile(partial(by_function, SimpleNamespace(w=model.w)), **settings)


@torch.jit.script
def scripted(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.matmul(h, weight.t()) + bias


def into(model: Any, h: Tensor) -> Tensor:
    out = torch.zeros(*h.shape[:2], N)
    POOL.submit(lambda: out.copy_(by_function(model, h))).result()
    return out


def by_address(model: Any, h: Tensor) -> Tensor:
    weight = model.w.weight
    values = bytearray(ctypes.string_at(weight.data_ptr(), weight.nbytes))
    return F.linear(h, torch.frombuffer(values, dtype=weight.dtype).view(N, K), model.w.bias)


def hooked(model: Any) -> None:
    model.w.register_forward_hook(lambda m, a, y: F.linear(a[0], m.weight, m.bias))


def hooked_before(model: Any) -> None:
    kept: list[Tensor] = []
    model.w.register_forward_pre_hook(lambda m, a: kept.append(F.linear(a[0], m.weight, m.bias)))
    model.w.register_forward_hook(lambda m, a, y: kept.pop())


def hooked_with_numpy(model: Any) -> None:
    model.w.register_forward_hook(
        lambda m, a, y: torch.from_numpy(a[0].numpy() @ m.weight.detach().numpy().T) + m.bias
    )


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrised(model: Any) -> None:
    parametrize.register_parametrization(model.w, "weight", Doubled())


def call_f(model: Any, h: Tensor) -> Tensor:
    return model.f(h)


def by_c(model: Any, h: Tensor) -> Tensor:
    return F.linear(h, model.c, model.w.bias)


def beside(model: Any, h: Tensor) -> Tensor:
    return model.w(h) + F.linear(h, model.w.weight)


#: The base's answer to eager calls and graphs that do not look.
COPIES: dict[str, type[Past]] = {
    "attribute": past(by_c, lambda m: setattr(m, "c", m.copied)),
    "buffer": past(by_c, lambda m: m.register_buffer("c", m.copied)),
    "parameter": past(by_c, lambda m: setattr(m, "c", nn.Parameter(m.copied, False))),
    "transposed": past(
        lambda m, h: h @ m.c + m.w.bias, lambda m: setattr(m, "c", m.copied.T.contiguous())
    ),
    "list": past(lambda m, h: F.linear(h, m.c[0], m.w.bias), lambda m: setattr(m, "c", [m.copied])),
    "nested": past(
        lambda m, h: F.linear(h, m.c["k"][0], m.w.bias),
        lambda m: setattr(m, "c", {"k": (m.copied,)}),
    ),
    "object": past(
        lambda m, h: F.linear(h, m.c.held, m.w.bias),
        lambda m: setattr(m, "c", SimpleNamespace(held=m.copied)),
    ),
    "closure": past(call_f, closed_over),
    "closure beside the call": past(lambda m, h: m.w(h) + m.f(h), closed_over),
    "default argument": past(call_f, defaulted),
    "partial": past(
        call_f, lambda m: setattr(m, "f", partial(F.linear, weight=m.copied, bias=m.w.bias))
    ),
    "double": past(
        lambda m, h: F.linear(h.double(), m.c).float() + m.w.bias,
        lambda m: setattr(m, "c", m.copied.double()),
    ),
    "rows": past(
        lambda m, h: F.linear(h, m.c[0]), lambda m: setattr(m, "c", [m.copied[8:16].clone()])
    ),
}  # fmt: skip

PAST: dict[str, type[Past]] = {
    "traced by fx": past(call_f, lambda m: setattr(m, "f", torch.fx.symbolic_trace(Inner(m.w)))),
    "numpy": past(
        lambda m, h: torch.from_numpy(h.numpy() @ m.w.weight.detach().numpy().T) + m.w.bias
    ),
    "array": past(lambda m, h: torch.from_numpy(np.asarray(h) @ np.asarray(m.w.weight).T)),
    "array from before": past(
        lambda m, h: torch.from_numpy(h.numpy() @ m.c.T),
        lambda m: setattr(m, "c", m.w.weight.detach().numpy()),
    ),
    "hook": past(None, hooked),
    "hook before the forward": past(None, hooked_before),
    "hook with numpy": past(None, hooked_with_numpy),
    "scripted": past(lambda m, h: scripted(h, m.w.weight, m.w.bias)),
    **COPIES,
}

#: What graphs refuse, too.
REFUSED: dict[str, type[Past]] = {
    "list of numbers": past(lambda m, h: F.linear(h, torch.tensor(m.w.weight.tolist()))),
    "address": past(by_address),
    "thread": past(lambda m, h: POOL.submit(by_function, m, h).result()),
    "thread that writes": past(into),
    "parametrised beside the call": past(beside, parametrised),
}


def case_of(cls: type[Past], save: Callable[..., Case]) -> Case:
    """A case of the class as it is before `prepare`; see the fixture `small`."""
    return save(cls, ["w"], ["w", "first"])


def compile_prepared(case: Case, **options: Any) -> Any:
    """The prepared model, compiled."""
    model = case.model()
    model.prepare()
    options = {**REFERENCE, "cache": None, **options}
    return lorafx.compile(model, case.folders, options=options)


def expected(case: Case, names: Sequence[str | None], x: Tensor) -> Tensor:
    """Row b of the whole batch by the prepared model with adapter b merged."""
    rows = []
    for row, name in enumerate(names):
        twin = copy.deepcopy(case.alone(name))
        delta = (twin.w.weight - case.base.w.weight).detach()
        with torch.no_grad():
            twin.w.weight.copy_(case.base.w.weight)
            twin.prepare()
            if parametrize.is_parametrized(twin.w):  # W + ΔW, where W is what the module uses
                parametrize.remove_parametrizations(twin.w, "weight")
            elif hasattr(twin.w, "weight_orig"):
                prune.remove(twin.w, "weight")
            else:
                twin = copy.deepcopy(case.alone(name))
                twin.prepare()
                delta = torch.zeros(())
            twin.w.weight.data += delta
            rows.append(twin(x=x)["logits"][row])
    return torch.stack(rows)


def check(cm: Any, case: Case, names: Sequence[str | None]) -> None:
    """The call is right."""
    x = torch.randn(len(names), 3, K)
    got = cm(x=x.clone(), adapter_names=names)["logits"]
    assert error(got, expected(case, names, x)) <= 1e-5, names
