"""The Triton source of a generated kernel: a template of kernels/triton/templates, filled in.

    source(kernel, spec, tiles) = heading + template[kernel](sizes, column ranges, dtypes, tiles)

    shrink       v[p, m, j·R + r] = scale · Σ_(k in part p) A[s, i_j·R + r, k] x[m, k]
    linear       y[m] = x[m] Wᵀ + b + v[m] B[s]    v from shrink's planes ("epilogue"), without the
                 base product ("expand"), or with that of `split` ("reduce")
    split        y[q, m] = Σ_(k in part q) x[m, k] W[:, k], and shrink by programs of its own
    shrink_rows, expand_rows    the same a row at a time, without matrix instructions
    embedding_rows              expand_rows with A[s, id] for v
    gather, place  B behind the columns of W, and v behind those of x, for one product of both
    order        the requests sorted by slot
    attend, attend_split, attend_sum, write_new    attention over a paged cache

s is the slot of row m, r runs over the s-th adapter's rank. Every size is a literal of the source,
except for the batch's (M rows, n slots, rows a request), which are arguments.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import jinja2
import torch

from lorafx.kernels.ops.delta_spec import DeltaSpec
from lorafx.kernels.triton.tiles import Tiles, power_of_two

TYPES = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}

#: Unit of columns of "concat" in elements: the part of K of a matrix instruction, 32 bytes.
COLUMN_UNIT = 16

# kernel -> its template and the constants that tell it from the template's other kernels
KERNELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "shrink": ("shrink", {}),
    "epilogue": ("linear", {"base": True, "reduce": False}),
    "expand": ("linear", {"base": False, "reduce": False}),
    "gather": ("concat", {"function": "gather"}),
    "place": ("concat", {"function": "place"}),
    "split": ("split", {}),
    "reduce": ("linear", {"base": False, "reduce": True}),
    "shrink_rows": ("rows", {"function": "shrink_rows"}),
    "expand_rows": ("rows", {"function": "expand_rows", "embedding": False}),
    "embedding_rows": ("rows", {"function": "expand_rows", "embedding": True}),
    "order": ("order", {}),
    "write_new": ("paged_attention", {"function": "write_new"}),
    "attend": ("paged_attention", {"function": "attend", "split": False}),
    "attend_split": ("paged_attention", {"function": "attend", "split": True}),
    "attend_sum": ("paged_attention", {"function": "attend_sum"}),
}


@dataclass(frozen=True)
class TritonSpec:
    """The constants of the kernels of one LoRA node.

    Attributes:
        weight_dtype, transposed: of the base weight, (K, N) if transposed.
        by_request: "concat" has a block of columns for each request instead of each slot.
    """

    delta: DeltaSpec
    weight_dtype: torch.dtype | None = None
    bias: bool = False
    transposed: bool = False
    by_request: bool = False

    @property
    def out_features(self) -> int:
        return sum(self.delta.sizes)

    @property
    def planes(self) -> int:
        """Factors of a row of v: R for each column range."""
        return len(self.delta.sizes) * self.delta.max_rank

    @property
    def width(self) -> int:
        """Columns of a block of "concat"."""
        return -(-self.delta.max_rank // COLUMN_UNIT) * COLUMN_UNIT

    def supported(self) -> bool:
        """Whether kernels are generated for it: 16- and 32-bit floats, nothing empty."""
        return self.delta.supported() and self.weight_dtype in (None, self.delta.x_dtype)

    def heading(self) -> list[str]:
        d = self.delta
        dtypes = f"x {d.x_dtype}, bank {d.bank_dtype}, y {d.y_dtype}"
        ranges = zip(d.siblings, d.offsets, d.sizes, strict=True)
        text = "; ".join(f"sibling {i}, bank [{o}, {o + size})" for i, o, size in ranges)
        lines = [
            f"K {d.in_features}, rank at most {d.max_rank}, {d.group} siblings; {dtypes}",
            f"column ranges of y: {text}",
        ]
        if self.weight_dtype is not None:
            shape = "(K, N)" if self.transposed else "(N, K)"
            lines.append(f"weight {shape}, {'with' if self.bias else 'without'} bias")
        return lines

    def parameters(self, kernel: str, tiles: Tiles) -> dict[str, Any]:
        d = self.delta
        counts = [-(-size // tiles.block_n) for size in d.sizes]
        k_blocks = -(-max(d.in_features, 1) // tiles.block_k)
        first = d.siblings[0]
        k_part = -(-k_blocks // tiles.parts) * tiles.block_k
        split_part = -(-k_blocks // tiles.split) * tiles.block_k
        ragged = d.in_features % tiles.block_k > 0
        factors = power_of_two(d.max_rank, 1, tiles.block_r)
        batched = tiles.batched and factors >= d.max_rank
        sizes_by_name = {
            "K": d.in_features,
            "N": self.out_features,
            "R": d.max_rank,
            "G": d.group,
            "SPACING": d.slot_rows,
            "B_COLUMNS": d.columns,
            "PLANES": self.planes,
            "PARTS": tiles.parts,
            "K_PART": k_part,
            "SPLIT": tiles.split,
            "SPLIT_PART": split_part,
            "R_TILES": -(-self.planes // tiles.block_r),
            "N_TILES": -(-self.out_features // tiles.block_n),
            "TILES_N": sum(counts),
            "FACTORS": factors,
            "ABREAST": tiles.block_r // factors,
            "WIDE": tiles.picked or tiles.block_m,
            "LANES": tiles.lanes,
            "WIDTH": self.width,
            "COLUMNS": len(d.sizes) * self.width,
            "GROUP_M": tiles.group_m,
            **tiles.blocks,
        }
        return {
            **self._dtypes(),
            "sizes_by_name": sizes_by_name,
            "siblings": list(d.siblings),
            "consecutive": d.siblings == tuple(range(first, first + len(d.siblings))),
            "offsets": list(d.offsets),
            "sizes": list(d.sizes),
            "starts": _starts(d.sizes),
            "range_firsts": [j * d.max_rank for j in range(len(d.sizes))],
            "tile_firsts": _starts(tuple(counts)),
            "tiles_block": power_of_two(sum(counts), 1, 1 << 20),
            # Of a kernel that takes a tile's slots side by side, or goes slot by slot after all.
            "slot_factors": power_of_two(factors, 16, 16) if batched else tiles.block_r,
            "code": 1 << d.max_rank.bit_length(),
            "bias": self.bias,
            "transposed": self.transposed,
            "out_features": self.out_features,
            "ragged_k": ragged
            or (kernel in ("shrink", "split") and tiles.parts * k_part > d.in_features),
            "split_ragged": ragged or tiles.split * split_part > d.in_features,
            "ragged_n": any(size % tiles.block_n for size in d.sizes),
            "batched": batched,
            "at_once": tiles.at_once if batched else 0,
            "width": self.width,
            "requests": self.by_request,
        }

    def _dtypes(self) -> dict[str, str]:
        """Types of the products: 16-bit operands where both have one 16-bit type, else float32."""
        d = self.delta
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


def _starts(sizes: tuple[int, ...]) -> list[int]:
    return [sum(sizes[:j]) for j in range(len(sizes))]


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("lorafx.kernels.triton", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


@functools.cache
def generator_hash() -> str:
    """A hash of the templates and this file, which is part of every kernel's id."""
    files = [Path(__file__), *sorted(Path(__file__).parent.glob("templates/*.jinja"))]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


class Spec(Protocol):
    def heading(self) -> list[str]: ...

    def parameters(self, kernel: str, tiles: Tiles) -> dict[str, Any]: ...


def source(kernel: str, spec: Spec | None, tiles: Tiles) -> str:
    """The complete Python text of `kernel`; `order` depends on no spec."""
    template, constants = KERNELS[kernel]
    heading = [*([] if spec is None else spec.heading()), f"tiles: {tiles}"]
    filled = {
        **asdict(tiles),
        **({} if spec is None else spec.parameters(kernel, tiles)),
        **constants,
        "heading": f"Generated from {template}.py.jinja: {kernel}.\n\n" + "\n".join(heading) + "\n",
    }
    text = _environment().get_template(f"{template}.py.jinja").render(filled)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
