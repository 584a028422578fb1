"""The Triton source of one generated kernel: a template of kernels/templates and its parameters.

    source(kernel, spec, tiles) = heading + template[kernel](sizes, column ranges, dtypes, tiles)

    shrink       v[p, m, j·R + r] = scale · Σ_(k in part p) A[s, i_j·R + r, k] x[m, k]
    linear       y[m] = x[m] Wᵀ + b + v[m] B[s]    v from shrink's planes ("epilogue"), computed
                 by the tile itself ("recompute"), without the base product ("expand"), or with
                 that of `split` ("reduce")
    split        y[q, m] = Σ_(k in part q) x[m, k] W[:, k], and shrink by programs of its own
    shrink_rows, expand_rows    the same a row at a time, without matrix instructions
    embedding_rows              expand_rows with A[s, id] for v
    gather, place  B behind the columns of W, and v behind those of x, for one product of both
    order        the requests sorted by slot
    activate     h = f(…) of other tensors, and shrink for x = h
    attend, attend_split, attend_sum, write_new    attention over a paged cache (attention_spec.py)

With routed experts rows are sorted by expert, a tile is of one expert, and s is its (slot, expert).
s is the slot of row m, r runs over the s-th adapter's own rank. Every size but those of the batch
is a literal of the source; the batch's own (M rows, n slots, rows a request) are arguments.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch

from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.activation import Activation
from lorafx.kernels.triton.attention_spec import PagedAttentionSpec
from lorafx.kernels.triton.longer import Longer, width_of
from lorafx.kernels.triton.triton_tiles import Tiles, power_of_two

TYPES = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}

#: Lines of 128 bytes of each column of W that a program fetches before there is an x.
FETCHED = 4

# kernel -> its template and the constants that tell it from the template's other kernels
KERNELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "shrink": ("shrink", {}),
    "epilogue": ("linear", {"base": True, "recompute": False, "reduce": False}),
    "recompute": ("linear", {"base": True, "recompute": True, "reduce": False}),
    "expand": ("linear", {"base": False, "recompute": False, "reduce": False}),
    "gather": ("concat", {"function": "gather"}),
    "place": ("concat", {"function": "place"}),
    "split": ("split", {}),
    "reduce": ("linear", {"base": False, "recompute": False, "reduce": True}),
    "shrink_rows": ("rows", {"function": "shrink_rows"}),
    "expand_rows": ("rows", {"function": "expand_rows", "embedding": False}),
    "embedding_rows": ("rows", {"function": "expand_rows", "embedding": True}),
    "order": ("order", {}),
    "activate": ("shrink", {}),
    "write_new": ("paged_attention", {"function": "write_new"}),
    "attend": ("paged_attention", {"function": "attend", "split": False}),
    "attend_split": ("paged_attention", {"function": "attend", "split": True}),
    "attend_sum": ("paged_attention", {"function": "attend_sum"}),
}


@dataclass(frozen=True)
class TritonSpec:
    """What the kernels of one LoRA node take for granted.

    Attributes:
        delta: dtypes, sizes and column ranges, as the CPU kernels have them.
        weight_dtype: of the base weight, for a strategy that computes the base product too.
        bias: whether there is a base bias.
        transposed: the base weight is (K, N).
        experts: E where the weight holds one for each expert; 0 for all others.
        activation: what x is computed by, for a strategy that does so itself.
        longer: which columns are added to x and W, for a strategy that does so.
    """

    delta: DeltaSpec
    weight_dtype: torch.dtype | None = None
    bias: bool = False
    transposed: bool = False
    experts: int = 0
    activation: Activation | None = None
    longer: Longer | None = None

    @property
    def out_features(self) -> int:
        """Columns of y."""
        return sum(self.delta.sizes)

    @property
    def planes(self) -> int:
        """Factors of a row of v: R for each column range."""
        return len(self.delta.sizes) * self.delta.max_rank

    def supported(self) -> bool:
        """Whether kernels are generated for it: 16- and 32-bit floats, nothing empty."""
        return self.delta.supported() and (
            self.weight_dtype is None or self.weight_dtype == self.delta.x_dtype
        )


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("lorafx.kernels.triton", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def hash_of(folder: Path) -> str:
    """A hash of the templates under `folder` and of the file that fills them."""
    files = [folder / "triton_source.py", *sorted((folder / "templates").glob("*.jinja"))]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


@functools.cache
def generator_hash() -> str:
    """`hash_of` this package: kernels of other generators have other ids."""
    return hash_of(Path(__file__).parent)


def _starts(sizes: tuple[int, ...]) -> list[int]:
    return [sum(sizes[:j]) for j in range(len(sizes))]


#: What a kernel is generated for; None for `order`, which depends on nothing.
AnySpec = TritonSpec | PagedAttentionSpec | None


def heading(kernel: str, spec: AnySpec, tiles: Tiles) -> str:
    """The comment that a generated file opens with: what it was made from."""
    lines = [f"Generated from {KERNELS[kernel][0]}.py.jinja: {kernel}."]
    if isinstance(spec, PagedAttentionSpec):
        lines.append(f"{spec}")
    elif spec is not None:
        d = spec.delta
        dtypes = f"x {d.x_dtype}, bank {d.bank_dtype}, y {d.y_dtype}"
        lines.append(f"K {d.in_features}, rank at most {d.max_rank}, {d.group} siblings; {dtypes}")
        ranges = zip(d.siblings, d.offsets, d.sizes, strict=True)
        text = "; ".join(f"sibling {i}, bank [{o}, {o + size})" for i, o, size in ranges)
        lines.append(f"column ranges of y: {text}")
        if spec.weight_dtype is not None:
            shape = "(K, N)" if spec.transposed else "(N, K)"
            lines.append(f"weight {shape}, {'with' if spec.bias else 'without'} bias")
        if spec.experts:
            lines.append(f"{spec.experts} experts, rows sorted by expert")
    lines.append(f"tiles: {tiles}")
    return "\n\n".join((lines[0], "\n".join(lines[1:]))) + "\n"


def _dtypes(spec: TritonSpec) -> dict[str, str]:
    """Types of the products: 16-bit operands where both have one 16-bit type, else float32."""
    d = spec.delta
    same = d.x_dtype == d.bank_dtype
    # Exact in float32 where y could tell: v · B in 16 bits costs 2⁻¹⁷ of it.
    expand = d.bank_dtype if d.bank_dtype == d.y_dtype else torch.float32
    wide = ".to(tl.float32)"
    return {
        "base_dtype": TYPES[d.x_dtype],
        "dot_dtype": TYPES[d.x_dtype] if same else "tl.float32",
        "x_cast": "" if same or d.x_dtype == torch.float32 else wide,
        "a_cast": "" if same or d.bank_dtype == torch.float32 else wide,
        "expand_dtype": TYPES[expand],
        "b_cast": "" if d.bank_dtype == expand else wide,
        "y_dtype": TYPES[d.y_dtype],
    }


def parameters(kernel: str, spec: TritonSpec, tiles: Tiles) -> dict[str, Any]:
    """What the template of `kernel` is filled with."""
    d = spec.delta
    counts = [-(-size // tiles.block_n) for size in d.sizes]
    k_blocks = -(-max(d.in_features, 1) // tiles.block_k)
    k_part = -(-k_blocks // tiles.parts) * tiles.block_k
    split_part = -(-k_blocks // tiles.split) * tiles.block_k
    ragged = d.in_features % tiles.block_k > 0
    factors = power_of_two(d.max_rank, 1, tiles.block_r)
    batched = tiles.batched and factors >= d.max_rank
    return {
        **_dtypes(spec),
        "in_features": d.in_features,
        "max_rank": d.max_rank,
        "group": d.group,
        "spacing": d.slot_rows,
        "columns": d.columns,
        "siblings": list(d.siblings),
        "consecutive": d.siblings == tuple(range(d.siblings[0], d.siblings[0] + len(d.siblings))),
        "offsets": list(d.offsets),
        "sizes": list(d.sizes),
        "starts": _starts(d.sizes),
        "range_firsts": [j * d.max_rank for j in range(len(d.sizes))],
        "tile_firsts": _starts(tuple(counts)),
        "tiles_n": sum(counts),
        "tiles_block": power_of_two(sum(counts), 1, 1 << 20),
        # of a kernel that takes a tile's slots side by side, or goes slot by slot after all
        "factors": factors,
        "abreast": tiles.block_r // factors,
        "slot_factors": power_of_two(factors, 16, 16) if batched else tiles.block_r,
        "code": 1 << d.max_rank.bit_length(),
        "bias": spec.bias,
        "transposed": spec.transposed,
        "out_features": spec.out_features,
        "k_part": k_part,
        "ragged_k": ragged
        or (kernel in ("shrink", "split", "activate") and tiles.parts * k_part > d.in_features),
        "split_part": split_part,
        "split_ragged": ragged or tiles.split * split_part > d.in_features,
        # lines of the cache of a column of W that are fetched ahead
        "line": max(128 // d.x_dtype.itemsize, 1),
        "fetched": FETCHED,
        "ragged_n": any(size % tiles.block_n for size in d.sizes),
        **asdict(tiles),
        "batched": batched,
        "at_once": tiles.at_once if batched else 0,
        "grouped": spec.experts > 0,
        "experts": spec.experts,
        "experts_block": power_of_two(spec.experts, 1, 1 << 20),
        "activation": spec.activation if kernel == "activate" else None,
        **_columns(spec),
    }


def _columns(spec: TritonSpec) -> dict[str, Any]:
    """What a template needs to know of the columns that x and W get."""
    if spec.longer is None:
        return {}
    return {"width": width_of(spec.delta.max_rank), "requests": spec.longer.requests}


def source(kernel: str, spec: AnySpec, tiles: Tiles) -> str:
    """The complete Python text of `kernel`."""
    template, constants = KERNELS[kernel]
    filled = asdict(tiles)
    if isinstance(spec, PagedAttentionSpec):
        filled |= {**spec.parameters(), "dtype": TYPES[spec.dtype]}
    elif spec is not None:
        filled = parameters(kernel, spec, tiles)
    text = (
        _environment()
        .get_template(f"{template}.py.jinja")
        .render({**filled, **constants}, heading=heading(kernel, spec, tiles))
    )
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
