"""Small modules made of drawn building blocks, as fuzzers of tensor compilers draw programs.

A model is a chain of one to four blocks, h ← tanh(block(h)) + h, on h of (B, T, D). Each block has
linears, embeddings or convolutions that may carry an adapter, and uses them in a way of its own.
The oracle builds the same model anew in float64, with W + ΔW in the place of each W, and runs each
row alone.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from adapters_in_memory import factors_of, merge, source_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import lorafx

D, T, V = 8, 4, 11
BLOCKS: dict[str, type[Block]] = {}


class Block(nn.Module):
    """A building block. `derive` makes what depends on weights: the oracle calls it once more after
    it has merged an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.make()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        BLOCKS[cls.__name__] = cls

    def make(self) -> None:
        self.a = nn.Linear(D, D)

    def derive(self) -> None: ...


# --- calls of modules ---
class Plain(Block):
    def forward(self, h: Tensor) -> Tensor:
        return self.a(h)


class Gated(Block):
    def make(self) -> None:
        self.a, self.b, self.c = nn.Linear(D, 12), nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.c(F.silu(self.a(h)) * self.b(h))


class Subclass(Block):
    class Linear(nn.Linear):
        """A subclass that changes nothing."""

    def make(self) -> None:
        self.a = self.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h)


class ActingSubclass(Block):
    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(F.linear(x, self.weight, self.bias)) * 2

    def make(self) -> None:
        self.a = self.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h)


class EqualisedSubclass(Block):
    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 0.3, self.bias)

    def make(self) -> None:
        self.a = self.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h)


class TransposingSubclass(Block):
    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.weight @ x.transpose(1, 2)).transpose(1, 2)

    def make(self) -> None:
        self.a = self.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h)


class Turned(Block):
    """Multiplies a short sequence by another orientation of its weight than a long one."""

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight if x.shape[1] == T else self.weight.clone().T)

    def make(self) -> None:
        self.a = self.Linear(D, D, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h) + F.pad(self.a(h[:, :2]), (0, 0, 0, 2))


class Tripled(Block):
    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.reshape(-1, D), self.weight.T, alpha=3).view(x.shape)

    def make(self) -> None:
        self.a = self.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h)


class Clamped(Block):
    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data.clamp_(-0.1, 0.1)
            return super().forward(x)

    def make(self) -> None:
        self.a = self.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h)


class Borrowing(Block):
    """A module that multiplies by another one's weight."""

    class Linear(nn.Linear):
        lender: list[nn.Linear]

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.lender[0].weight, self.bias)

    def make(self) -> None:
        self.a, self.b = self.Linear(D, D), nn.Linear(D, D)
        self.a.lender = [self.b]

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h)


class Exchanged(Block):
    def make(self) -> None:
        self.a, self.weight = nn.Linear(D, D), nn.Parameter(torch.randn(D, D))

    def forward(self, h: Tensor) -> Tensor:
        return torch.func.functional_call(self.a, {"weight": self.weight}, (h,))


class ExchangedData(Block):
    """Where eager mode gives up in the call of the linear, its weight has its own memory again."""

    def make(self) -> None:
        self.a, self.weight = nn.Linear(D, D), nn.Parameter(torch.randn(D, D))

    def forward(self, h: Tensor) -> Tensor:
        before, self.a.weight.data = self.a.weight.data, self.weight.data
        y = self.a(h)
        self.a.weight.data = before
        return y


class InInferenceMode(Block):
    def forward(self, h: Tensor) -> Tensor:
        with torch.inference_mode():
            y = self.a(h)
        return y.clone()


class TwiceCalled(Block):
    def forward(self, h: Tensor) -> Tensor:
        return self.a(torch.tanh(self.a(h)))


class Aliased(Block):
    def make(self) -> None:
        self.a = nn.Linear(D, D)
        self.also = nn.ModuleDict({"same": self.a})

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h) + self.also["same"](h * 2)


class Nested(Block):
    def make(self) -> None:
        self.inner = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.ModuleList([nn.Linear(D, D)])[0])

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h)


class Dispatched(Block):
    def make(self) -> None:
        self.ways = nn.ModuleDict({"a": nn.Linear(D, D), "b": nn.Linear(D, D)})

    def forward(self, h: Tensor) -> Tensor:
        for name in ("a", "b"):
            h = {"a": self.ways["a"], "b": self.ways["b"]}[name](h)
        return h


class InPlace(Block):
    def forward(self, h: Tensor) -> Tensor:
        y = self.a(h)
        y.mul_(2)
        y[..., :2] += h[..., :2]
        return y


class DirectForward(Block):
    def forward(self, h: Tensor) -> Tensor:
        return self.a.forward(h)


class Partial(Block):
    def forward(self, h: Tensor) -> Tensor:
        return functools.partial(self.a, input=h)()


class Mapped(Block):
    def forward(self, h: Tensor) -> Tensor:
        one, two = map(self.a, (h, h * 2))
        return one + two


class Generated(Block):
    def forward(self, h: Tensor) -> Tensor:
        def values() -> Any:
            for factor in (1, 2):
                yield self.a(h * factor)

        return sum(values(), torch.zeros(()))


class Checkpointed(Block):
    def forward(self, h: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.a, h, use_reentrant=False)


class Pooled(Block):
    def forward(self, h: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.a, h).result()


class PooledUse(Block):
    def forward(self, h: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(F.linear, h, self.a.weight, self.a.bias).result()


class Hooked(Block):
    def make(self) -> None:
        self.a = nn.Linear(D, D)
        self.a.register_forward_hook(lambda module, args, y: y * 2)
        self.a.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h)


class HookedAnew(Block):
    def make(self) -> None:
        self.a = nn.Linear(D, D)
        self.a.register_forward_hook(
            lambda module, args, y: F.linear(args[0], module.weight, module.bias)
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h)


# --- uses of weights ---
class ByFunction(Block):
    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.a.weight, self.a.bias)


class ByMatmul(Block):
    def forward(self, h: Tensor) -> Tensor:
        return h @ self.a.weight.T + self.a(h)


class ByAddmm(Block):
    def forward(self, h: Tensor) -> Tensor:
        flat = torch.addmm(self.a.bias, h.reshape(-1, D), self.a.weight.t())
        return flat.view(h.shape)


class ByEinsum(Block):
    def forward(self, h: Tensor) -> Tensor:
        return torch.einsum("btk,nk->btn", h, self.a.weight)


class ByColumns(Block):
    def forward(self, h: Tensor) -> Tensor:
        return h * self.a.weight[0] + self.a(h)


class Halves(Block):
    def forward(self, h: Tensor) -> Tensor:
        first, second = self.a.weight.chunk(2)
        return torch.cat([F.linear(h, first), F.linear(h, second)], -1)


class Scaled(Block):
    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.a.weight * 0.5)


class Joined(Block):
    def make(self) -> None:
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, torch.cat([self.a.weight, self.b.weight])).view(*h.shape, 2).sum(-1)


class Multiplied(Block):
    def make(self) -> None:
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.a.weight @ self.b.weight)


class Chained(Block):
    def make(self) -> None:
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(F.linear(h, self.a.weight), self.b.weight)


class Transposed(Block):
    """The product of another orientation: h W."""

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.a.weight


class Copied(Block):
    def derive(self) -> None:
        self.copy = self.a.weight.detach().clone()

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.copy) + self.a(h)


class CopiedBuffer(Block):
    def derive(self) -> None:
        self.register_buffer("copy", self.a.weight.detach().T.contiguous())

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.copy


class CopiedIntoList(Block):
    def derive(self) -> None:
        self.held = {"weights": [self.a.weight.detach().clone()]}

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.held["weights"][0])


class CopiedIntoClosure(Block):
    def derive(self) -> None:
        weight = self.a.weight.detach().clone()
        self.product = lambda x: F.linear(x, weight)

    def forward(self, h: Tensor) -> Tensor:
        return self.product(h)


class ScaledCopy(Block):
    """No copy of rows, so it is refused."""

    def derive(self) -> None:
        self.copy = self.a.weight.detach() * 3

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.copy)


class ScaledCopyInDict(Block):
    def derive(self) -> None:
        self.held = {"weight": self.a.weight.detach() * 3}

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.held["weight"])


class RoundedCopy(Block):
    def derive(self) -> None:
        self.scale = self.a.weight.detach().abs().amax() / 127
        self.copy = (self.a.weight.detach() / self.scale).round().to(torch.int8)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.copy.to(h.dtype) * self.scale)


class CopiedByNumpy(Block):
    def derive(self) -> None:
        self.copy = self.a.weight.detach().numpy().copy()

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, torch.from_numpy(self.copy))


class HeldOutside(Block):
    """A module that the model does not list as its own has the parameter, too."""

    def derive(self) -> None:
        linear = nn.Linear(D, D, bias=False)
        linear.weight = self.a.weight
        self.held = [linear]

    def forward(self, h: Tensor) -> Tensor:
        return self.held[0](h)


class SparseCopy(Block):
    def derive(self) -> None:
        self.w = self.a.weight.detach().to_sparse()

    def forward(self, h: Tensor) -> Tensor:
        return torch.sparse.mm(self.w, h.reshape(-1, D).t()).t().reshape(h.shape)


class StackedState(Block):
    """An ensemble, as in torch's tutorial on it."""

    def make(self) -> None:
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def derive(self) -> None:
        self.weights, _ = torch.func.stack_module_state([self.a, self.b])

    def forward(self, h: Tensor) -> Tensor:
        def run(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.a, weights, (h,))

        return torch.vmap(run)(self.weights).sum(0)


class Viewed(Block):
    def derive(self) -> None:
        self.view = self.a.weight.detach().view(2, D // 2, D)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.view.reshape(D, D))


class ByNumpy(Block):
    def forward(self, h: Tensor) -> Tensor:
        weight = torch.from_numpy(self.a.weight.detach().numpy().copy())
        return F.linear(h, weight)


class ByList(Block):
    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, h.new_tensor(self.a.weight.tolist()))


class Traced(Block):
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(D, D)

        def forward(self, h: Tensor) -> Tensor:
            return F.linear(h, self.a.weight) + self.a(h)

    def make(self) -> None:
        self.inner = torch.fx.symbolic_trace(self.Inner())

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h)


class Exported(Block):
    def make(self) -> None:
        batch = torch.export.Dim("batch", max=64)
        shapes = {"h": {0: batch}}
        program = torch.export.export(
            Traced.Inner(), (torch.zeros(3, T, D),), dynamic_shapes=shapes
        )
        self.inner = program.module()

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h) if h.shape[0] > 1 else self.inner(torch.cat([h, h]))[:1]


@torch.jit.script
def _scripted(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x) @ weight.t()


class ScriptedUse(Block):
    def forward(self, h: Tensor) -> Tensor:
        return _scripted(h, self.a.weight)


class WeightNormed(Block):
    def make(self) -> None:
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h)


class Parametrised(Block):
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    def make(self) -> None:
        self.a = nn.Linear(D, D)
        parametrize.register_parametrization(self.a, "weight", self.Double())

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h) + F.linear(h, self.a.weight)


# --- other kinds of sites ---
class Embedded(Block):
    def make(self) -> None:
        self.e, self.a = nn.Embedding(V, D), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.a(self.e((h[..., 0] * 3).long().abs() % V))


class EmbeddedAndScaled(Block):
    """Scales the rows of short sequences alone."""

    class Embedding(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * (1 if ids.shape[1] == T else 3)

    def make(self) -> None:
        self.e = self.Embedding(V, D)

    def forward(self, h: Tensor) -> Tensor:
        ids = (h[..., 0] * 3).long().abs() % V
        return self.e(ids) + F.pad(self.e(ids[:, :2]), (0, 0, 0, 2))


class EmbeddingAsHead(Block):
    def make(self) -> None:
        self.e, self.a = nn.Embedding(V, D), nn.Linear(V, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.a(h @ self.e.weight.T)


class EmbeddedByIndex(Block):
    def make(self) -> None:
        self.e = nn.Embedding(V, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.e.weight[(h[..., 0] * 3).long().abs() % V]


class Convolved(Block):
    def make(self) -> None:
        self.c = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.c(h.transpose(1, 2)).transpose(1, 2)


class ConvolvedInChain(Block):
    def make(self) -> None:
        self.c, self.d = nn.Conv1d(D, D, 1), nn.Conv1d(D, D, 1)

    def forward(self, h: Tensor) -> Tensor:
        x = F.conv1d(h.transpose(1, 2), self.c.weight)
        return F.conv1d(x, self.d.weight).transpose(1, 2)


# --- rows ---
class SequenceFirst(Block):
    def forward(self, h: Tensor) -> Tensor:
        return self.a(h.transpose(0, 1)).transpose(0, 1)


class Flattened(Block):
    def forward(self, h: Tensor) -> Tensor:
        return self.a(h.reshape(-1, D)).view(h.shape)


class RowByRow(Block):
    def forward(self, h: Tensor) -> Tensor:
        return torch.stack([self.a(row) for row in h])


class IntoBuffer(Block):
    def forward(self, h: Tensor) -> Tensor:
        out = torch.zeros_like(h)
        for i in range(h.shape[0]):
            out[i] = self.a(h[i])
        return out


class InPieces(Block):
    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([self.a(piece) for piece in h.chunk(2)])


class Flipped(Block):
    def forward(self, h: Tensor) -> Tensor:
        return self.a(h.flip(0)).flip(0)


class Rolled(Block):
    def forward(self, h: Tensor) -> Tensor:
        return self.a(h.roll(1, 0)).roll(-1, 0)


class Permuted(Block):
    def forward(self, h: Tensor) -> Tensor:
        order = torch.arange(h.shape[0] - 1, -1, -1)
        return self.a(h[order])[order]


class Repeated(Block):
    def forward(self, h: Tensor) -> Tensor:
        several = self.a(h.repeat_interleave(2, 0))
        return several.view(h.shape[0], 2, T, D).sum(1)


class Stacked(Block):
    def forward(self, h: Tensor) -> Tensor:
        one, two = self.a(torch.cat([h, -h])).chunk(2)
        return one - two


class Attending(Block):
    def make(self) -> None:
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        heads = [p(h).view(*h.shape[:2], 2, 4).transpose(1, 2) for p in (self.q, self.k, self.v)]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(h.shape)


class MultiHead(Block):
    def make(self) -> None:
        self.m = nn.MultiheadAttention(D, 2, batch_first=True)
        self.a = nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.a(self.m(h, h, h, need_weights=False)[0])


class Querying(Block):
    """Learned queries, which all requests share."""

    def make(self) -> None:
        self.query, self.k = nn.Parameter(torch.randn(T, D)), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        query = self.query.expand(h.shape[0], -1, -1)
        return F.scaled_dot_product_attention(query, self.k(h), h)


class ProjectedQuery(Block):
    """A projection of values that no request owns."""

    def make(self) -> None:
        self.query, self.a = nn.Parameter(torch.randn(T, D)), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return h * self.a(self.query)


class Recurrent(Block):
    def make(self) -> None:
        self.r, self.a = nn.LSTM(D, D, batch_first=True), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.a(self.r(h)[0])


class Gru(Block):
    def make(self) -> None:
        self.r, self.a = nn.GRU(D, D, bidirectional=True), nn.Linear(2 * D, D)

    def forward(self, h: Tensor) -> Tensor:
        return self.a(self.r(h.transpose(0, 1))[0]).transpose(0, 1)


class Routed(Block):
    def make(self) -> None:
        self.gate, self.a = nn.Linear(D, 3), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        flat = h.reshape(-1, D)
        order = self.gate(flat).argmax(-1).argsort()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return self.a(flat[order])[back].view(h.shape)


# --- transforms ---
class Vmapped(Block):
    def forward(self, h: Tensor) -> Tensor:
        return torch.vmap(self.a)(h)


class Differentiated(Block):
    def forward(self, h: Tensor) -> Tensor:
        return torch.func.grad(lambda x: self.a(x).pow(2).sum())(h)


class Pushed(Block):
    def forward(self, h: Tensor) -> Tensor:
        return torch.func.jvp(self.a, (h,), (torch.ones_like(h),))[1] + self.a(h)


class ByAutograd(Block):
    def forward(self, h: Tensor) -> Tensor:
        with torch.enable_grad():
            x = h.detach().requires_grad_()
            return torch.autograd.grad(self.a(x).pow(2).sum(), x)[0]


# --- state ---
class Counting(Block):
    def make(self) -> None:
        self.a, self.calls = nn.Linear(D, D), 0

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        return self.a(h) * self.calls


class Growing(Block):
    def make(self) -> None:
        self.a, self.seen = nn.Linear(D, D), list[int]()

    def forward(self, h: Tensor) -> Tensor:
        self.seen.append(len(self.seen))
        return self.a(h) * len(self.seen)


class CountingInBuffer(Block):
    def make(self) -> None:
        self.a = nn.Linear(D, D)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.a(h) * self.calls


class Compiled(Block):
    def derive(self) -> None:
        self.inner = torch.compile(lambda x: F.linear(x, self.a.weight), backend="eager")

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h)


#: How the model takes its input and gives its result.
INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "mapping": lambda x: {"x": x},
    "list": lambda x: [x],
    "tuple": lambda x: (x, x),
}


class Drawn(nn.Module):
    """The chain of blocks with these names."""

    def __init__(self, names: Sequence[str], form: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BLOCKS[name]() for name in names)
        self.form = form
        self.derive()

    def derive(self) -> None:
        for block in self.blocks:
            assert isinstance(block, Block)
            block.derive()

    def forward(self, x: Any) -> dict[str, Tensor]:
        h = x if isinstance(x, Tensor) else x["x"] if isinstance(x, dict) else x[0]
        for block in self.blocks:
            h = torch.tanh(block(h)) + h
        return {"logits": h}


_SITES = (nn.Linear, nn.Embedding, nn.Conv1d)


@dataclass(frozen=True)
class Program:
    """A drawn model with two adapters, "a" and "b"; all of it follows from these fields.

    Attributes:
        blocks: the names of the blocks.
        carried: which sites carry an adapter, in their order, again and again: "a", "b", "ab", "".
        names: the adapter of each request.
    """

    blocks: tuple[str, ...]
    carried: tuple[str, ...]
    names: tuple[str | None, ...]
    form: str = "tensor"
    dynamic: bool = False
    seed: int = 0

    def model(self) -> Drawn:
        torch.manual_seed(self.seed)
        model = Drawn(self.blocks, self.form).requires_grad_(False)
        for module in model.modules():
            module.training = False  # `eval` of an exported module raises
        return model

    def inputs(self) -> Tensor:
        return torch.randn(len(self.names), T, D, generator=self._generator())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1)

    def adapters(self, model: Drawn) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """The factors (A, B) of both adapters, by path."""
        normal = partial(_normal, self._generator())
        found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {"a": {}, "b": {}}
        sites = [(p, m) for p, m in model.named_modules() if isinstance(m, _SITES)]
        for number, (path, module) in enumerate(sites):
            for rank, name in ((2, "a"), (3, "b")):
                factors = factors_of(module, rank, normal)
                if name in self.carried[number % len(self.carried)]:
                    found[name][path] = factors
        return found

    def compiled(self, model: Drawn, start: str) -> Any:
        """The model compiled with the adapters that have a site."""
        sources = {
            name: source_of(model, factors)
            for name, factors in self.adapters(model).items()
            if factors
        }
        options = {"lowering": "reference", "start": start, "cache": None}
        config = lorafx.LoraConfig(max_rank=3, max_adapters=2)
        return lorafx.compile(
            model, config, adapters=sources, options=options, dynamic=self.dynamic
        )

    def expected(self) -> Tensor:
        """(B, T, D), each row alone on a model in float64 with its adapter merged."""
        x = self.inputs().double()
        rows = []
        for row, name in enumerate(self.names):
            model = self.model()
            factors = self.adapters(model).get(name or "", {})
            merge(model.double(), factors)
            model.derive()
            rows.append(model(INPUTS[self.form](x[row : row + 1]))["logits"])
        return torch.cat(rows)


def _normal(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=generator) * 0.4


def random_program(r: random.Random) -> Program:
    """A program by a plain random generator, for runs of many thousand."""
    count = r.choice((1, 1, 2, 2, 3, 4))
    return Program(
        tuple(r.choice(sorted(BLOCKS)) for _ in range(count)),
        tuple(r.choice(("a", "b", "ab", "ab", "")) for _ in range(3)),
        tuple(r.choice(("a", "b", None)) for _ in range(r.choice((1, 2, 3, 4)))),
        r.choice(("tensor", "tensor", *INPUTS)),
        r.random() < 0.2,
        r.randrange(1 << 16),
    )


def judged(program: Program, start: str) -> str:
    """What a road makes of a program: "right", "right, by a graph" that is compiled, or why it is
    refused. Raises AssertionError for a wrong answer, and whatever is no error of lorafx."""
    want = program.expected()
    model = program.model()
    try:
        cm = program.compiled(model, start)
        names = [name if name in cm.adapters else None for name in program.names]
        if names != list(program.names):
            program = Program(**{**vars(program), "names": tuple(names)})
            want = program.expected()
        got = cm(INPUTS[program.form](program.inputs()), adapter_names=names)["logits"]
    except lorafx.LorafxError as error:
        return f"{type(error).__name__}: {error}"
    apart = float((got.double() - want).abs().max()) / max(1.0, float(want.abs().max()))
    assert apart <= 1e-5, f"{start}: wrong by {apart:.2g}: {program}"
    return "right, by a graph" if cm.recompiles else "right"
