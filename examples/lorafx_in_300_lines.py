"""lorafx in 300 lines: its core, to be read at one sitting, on nothing but torch and Triton.

    trace ▶ find ▶ prove ▶ rewrite ▶ serve

A LoRA adapter makes a linear's weight W + s·B A, with A (r, K) and B (N, r). A server has many
adapters, and each request of a batch wants another one, or none. So W stays, and each row of x gets
the delta of the request that it belongs to:

    y[m] = x[m] Wᵀ + b + s·(x[m] Aᵀ) Bᵀ        A, B, s of row m's request, if it has an adapter

Which request is that? Before a linear runs, a model has flattened, transposed and broadcast its
activations, and row m may be anybody's. A guess would serve one user another's adapter. A
compiler sees the whole computation: it proves whose row is whose, and refuses what it cannot prove.
No module is replaced, and neither a new adapter nor another mix compiles anything.

    python examples/lorafx_in_300_lines.py
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where a kernel is imported

aten = torch.ops.aten
#: An adapter: the path of a linear -> A (r, K), B (N, r), s.
Adapter = Mapping[str, tuple[Tensor, Tensor, float]]


class Model(nn.Module):
    """A transformer of one layer, for token ids (requests, tokens), which knows nothing of LoRA.
    Its rows change their order: attention splits heads off, the MLP takes (tokens, requests, …)."""

    def __init__(self, vocabulary: int = 32, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(16, width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.up, self.down = nn.Linear(width, 40), nn.Linear(40, width)
        self.out, self.head = nn.Linear(width, width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        n, t = ids.shape
        x = self.tokens(ids) + self.positions(torch.arange(t, device=ids.device))
        h, linears = self.norm(x), (self.q, self.k, self.v)
        q, k, v = (linear(h).view(n, t, self.heads, -1).transpose(1, 2) for linear in linears)
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(n, t, -1))
        h = nn.functional.gelu(self.up(x.transpose(0, 1)))
        return self.head(x + self.down(h).transpose(0, 1))


# --- 1. Trace: a model becomes a graph ------------------------------------------------------------
# torch.export runs Dynamo and AOTAutograd, as torch.compile does. The graph is functional: nothing
# is written in place. Parameters are inputs of it. lorafx takes its graphs from torch.compile, for
# any sizes; one may end in the middle of a forward, and hands what was proved to the next.


def trace(model: nn.Module, ids: Tensor) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph for inputs like `ids`, and the model's tensors among its inputs: name -> path."""
    program = torch.export.export(model, (ids,)).run_decompositions({})
    signature = program.graph_signature
    return program.graph_module, {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


# --- 2. Find: where is W used? --------------------------------------------------------------------
# The weight says it, not the module, so a use is found however the model makes it. Here there is
# one kind, linear(x, W, b). lorafx follows W through views, casts and slices to products,
# embeddings, convolutions and experts; a use that no rule covers is refused by name.


class Refused(Exception):
    """Adapters are not served here, since their answer might be wrong."""


def find(graph: fx.Graph, held: Mapping[str, str], targets: Sequence[str]) -> dict[fx.Node, str]:
    """The linears whose weight is that of a target -> its path."""
    found: dict[fx.Node, str] = {}
    for weight in graph.find_nodes(op="placeholder"):
        path = held.get(weight.name, "").removesuffix(".weight")
        for node in weight.users if path in targets else ():
            if node.target is not aten.linear.default or node.args[1] is not weight:
                raise Refused(f"no rule says what a delta of {path} changes in {node.target}")
            found[node] = path
    return found


# --- 3. Prove: whose row is whose? ----------------------------------------------------------------
# A label says which request each element of a tensor belongs to:
#     E       element p, in row-major order, belongs to request (p // E) mod n
#     None    to none: all requests share it
# ids (n, T) have E = T. Views change nothing about a label. For other operators a rule says which
# dimension of the result a dimension of an operand becomes; None means that its entries are mixed.
# An operator without a rule is refused. Labels need shapes only: the proof holds for every batch.


def shape(node: fx.Node) -> Sequence[int]:
    return node.meta["val"].shape


def below_last(node: fx.Node, x: fx.Node, dim: int) -> int | None:
    """Of the first operand the last dimensions are summed, and no other may have a label."""
    last = len(node.args[1]) if node.target is aten.layer_norm.default else 1
    return dim if x is node.args[0] and dim < len(shape(x)) - last else None


def swapped(node: fx.Node, x: fx.Node, dim: int) -> int | None:
    a, b = (item % len(shape(x)) for item in node.args[1:])
    return {a: b, b: a}.get(dim, dim)


SDPA = aten.scaled_dot_product_attention.default
VIEWS = (aten.view.default, aten.reshape.default, aten.clone.default)
POINTWISE = (aten.add.Tensor, aten.mul.Tensor, aten.gelu.default)
RULES: dict[Any, Any] = {
    aten.linear.default: below_last,
    aten.layer_norm.default: below_last,
    aten.transpose.int: swapped,
    aten.embedding.default: lambda node, x, dim: dim if x is node.args[1] else None,
    SDPA: lambda node, x, dim: None if dim or len(shape(x)) != 4 else 0,  # (batch, heads, ...)
    **dict.fromkeys(POINTWISE, lambda node, x, dim: dim + len(shape(node)) - len(shape(x))),
}


def prove(graph: fx.Graph, held: Mapping[str, str], n: int) -> dict[fx.Node, int | None]:
    """The label of each node, for `n` requests in dimension 0 of the arguments."""
    labels: dict[fx.Node, int | None] = {}
    for node in graph.nodes:
        labels[node] = None
        owned = [source for source in node.all_input_nodes if labels[source] is not None]
        if node.op == "placeholder" and node.name not in held:
            labels[node] = math.prod(shape(node)[1:])
        elif owned and node.target in VIEWS:
            labels[node] = labels[owned[0]]
        elif owned and node.op != "output":
            found = {behind(node, source, labels[source], n) for source in owned}
            if len(found) > 1 or None in found:
                raise Refused(f"no rule says whose elements {node.target} gives")
            labels[node] = found.pop()
    return labels


def behind(node: fx.Node, x: fx.Node, label: int, n: int) -> int | None:
    for dim, size in enumerate(shape(x)):
        entries, rest = divmod(label, math.prod(shape(x)[dim + 1 :]))
        if entries and not rest and size % (entries * n) == 0:  # this one holds the requests
            moved = RULES[node.target](node, x, dim) if node.target in RULES else None
            return None if moved is None else entries * math.prod(shape(node)[moved + 1 :])
    return None


# --- 4. Rewrite: the base's product and the delta become one node ---------------------------------
#     y = linear(x, W, b)   →   y = fused_linear(x, W, b, A, B, slots, rows)
# A (S, R, K) and B (S, N, R) are the bank of this linear, with S slots for adapters up to rank R.
# `slots` has the slot of each request, −1 for none. Banks and slots are inputs of the graph, so it
# serves any adapters in any mix. `rows` is what was proved: row m is request (m // rows) mod n's.


def rewrite(gm: fx.GraphModule, found: Mapping[fx.Node, str], labels: Mapping[Any, Any]) -> None:
    """Rewrite in place. The new inputs are the slots, then A and B of each linear."""
    new = gm.graph.find_nodes(op="placeholder")[-1:]
    for name in ("slots", *(f"{factor}_{path}" for path in found.values() for factor in "AB")):
        with gm.graph.inserting_after(new[-1]):
            new.append(gm.graph.placeholder(name.replace(".", "_")))
    for node, A, B in zip(found, new[2::2], new[3::2], strict=True):
        x, weight, bias = (*node.args, None)[:3]
        rows, rest = divmod(labels[x] or 0, shape(x)[-1])
        if rest or not rows:
            raise Refused(f"{found[node]}: a row of x is not one request's")
        with gm.graph.inserting_before(node):
            fused = gm.graph.call_function(fused_linear, (x, weight, bias, A, B, new[1], rows))
        node.replace_all_uses_with(fused)
        gm.graph.erase_node(node)
    gm.recompile()


# --- 5. The kernel: x is read once, y is written once ---------------------------------------------
# Its text is generated, with the linear's sizes as constants. A tile of rows is multiplied by W,
# and for each slot by its A and B, masked to that slot's rows. lorafx sorts rows by slot, reads the
# real ranks, and chooses a strategy by a cost model; on a CPU it generates C++.

SOURCE = """
import triton, triton.language as tl

@triton.jit
def kernel(x, w, bias, A, B, slots, y, M, n, rows, S):
    m, c = tl.program_id(0) * 16 + tl.arange(0, 16), tl.program_id(1) * 16 + tl.arange(0, 16)
    k, r = tl.arange(0, {padded_K}), tl.arange(0, {padded_R})
    in_m, in_c, in_k, in_r = (m < M)[:, None], c < {N}, (k < {K})[None], r < {R}
    xs = tl.load(x + m[:, None] * {K} + k[None], in_m & in_k, 0.0)
    ws = tl.load(w + c[:, None] * {K} + k[None], in_c[:, None] & in_k, 0.0)
    out = tl.dot(xs, tl.trans(ws), input_precision="ieee") {add_bias}
    slot = tl.load(slots + (m // rows) % n, m < M, -1)
    for s in range(S):
        a = tl.load(A + (s * {R} + r[:, None]) * {K} + k[None], in_r[:, None] & in_k, 0.0)
        b = tl.load(B + (s * {N} + c[:, None]) * {R} + r[None], in_c[:, None] & in_r[None], 0.0)
        h = tl.dot(xs, tl.trans(a), input_precision="ieee")
        out += tl.dot(tl.where((slot == s)[:, None], h, 0.0), tl.trans(b), input_precision="ieee")
    tl.store(y + m[:, None] * {N} + c[None], out, in_m & in_c[None])
"""
FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def kernel_for(K: int, N: int, R: int, bias: bool) -> Any:
    """The kernel for these sizes. Triton reads its text, so it is a file."""
    sizes = {"K": K, "N": N, "R": R, "add_bias": "+ tl.load(bias + c, in_c, 0.0)[None]" * bias}
    sizes |= {f"padded_{s}": max(16, 1 << (sizes[s] - 1).bit_length()) for s in "KR"}
    path = Path(FOLDER.name) / f"linear_{K}_{N}_{R}_{bias}.py"
    path.write_text(SOURCE.format(**sizes))
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kernel


def fused_linear(x, w, b, A, B, slots, rows: int) -> Tensor:
    """x (…, K) Wᵀ + b and each row's delta: (…, N)."""
    (S, R, K), N = A.shape, len(w)
    flat = x.reshape(-1, K).contiguous()
    y, M = flat.new_empty((len(flat), N)), len(flat)
    kernel = kernel_for(K, N, R, b is not None)[-(-M // 16), -(-N // 16)]
    kernel(flat, w, b, A, B, slots, y, M, len(slots), rows, S)
    return y.view(*x.shape[:-1], N)


# --- 6. Serve: a name for each row ----------------------------------------------------------------


class Served:
    """A model for batches of the sizes of `ids`, with room for `slots` adapters up to `rank`."""

    def __init__(self, model: nn.Module, ids: Tensor, targets: Any, slots: int = 4, rank: int = 8):
        self.gm, held = trace(model, ids)
        found = find(self.gm.graph, held, targets)
        rewrite(self.gm, found, prove(self.gm.graph, held, len(ids)))
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.weights = [tensors[path] for path in held.values()]
        self.banks: dict[str, tuple[Tensor, Tensor]] = {}
        for path in found.values():
            N, K = (W := tensors[f"{path}.weight"].detach()).shape
            self.banks[path] = W.new_zeros(slots, rank, K), W.new_zeros(slots, N, rank)
        self.slots: dict[str | None, int] = {None: -1}

    def load(self, name: str, adapter: Adapter) -> None:
        """Write an adapter into the slot of its name. Nothing is compiled."""
        if strange := adapter.keys() - self.banks.keys():
            raise Refused(f"{name} has factors for {strange}, which are no targets")
        slot = self.slots.setdefault(name, len(self.slots) - 1)
        for path, (A, B) in self.banks.items():
            a, b, s = adapter.get(path, (A[slot, :0], B[slot, :, :0], 1.0))
            A[slot], B[slot] = 0.0, 0.0
            A[slot, : len(a)], B[slot, :, : len(a)] = a, s * b

    @torch.no_grad()
    def __call__(self, ids: Tensor, names: Sequence[str | None]) -> Tensor:
        """The model's output for a batch whose row i has the adapter names[i]."""
        slots = torch.tensor([self.slots[n] for n in names], dtype=torch.int32, device=ids.device)
        banks = (tensor for bank in self.banks.values() for tensor in bank)
        return self.gm(*self.weights, ids, slots, *banks)[0]


# --- Is it right? Each row beside the model whose weights are merged ------------------------------


def merged(model: nn.Module, adapter: Adapter, ids: Tensor) -> Tensor:
    deltas = {f"{path}.weight": s * (B @ A) for path, (A, B, s) in adapter.items()}
    weights = {name: model.get_parameter(name) + delta for name, delta in deltas.items()}
    return torch.func.functional_call(model, weights, ids)


def random_adapter(model: nn.Module, rank: int, targets: Sequence[str]) -> Adapter:
    shapes = {path: model.get_parameter(f"{path}.weight").shape for path in targets}
    return {p: (torch.randn(rank, K), torch.randn(N, rank), 0.1) for p, (N, K) in shapes.items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    names, every = ["chat", None, "sql", "chat"], ["q", "k", "v", "out", "up", "down", "head"]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model, ids = Model().eval(), torch.randint(32, (4, 5))
        served, adapters = Served(model, ids, every), {None: {}}
        for name, rank, targets in (("sql", 2, ["q", "v"]), ("chat", 7, every)):
            adapters[name] = random_adapter(model, rank, targets)
            served.load(name, adapters[name])
    for row, (name, y) in enumerate(zip(names, served(ids, names), strict=True)):
        torch.testing.assert_close(y, merged(model, adapters[name], ids[row : row + 1])[0])
        print(f"row {row}: {name or 'base'}: as when served alone")
