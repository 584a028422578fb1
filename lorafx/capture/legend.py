"""What stands on top of a dumped graph: how its names are made, what its sizes are, what lorafx's
own operators in it compute."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_OP = re.compile(r"torch\.ops\.lorafx\.(\w+)")

NAMES = (
    "Nodes are named by the site or module that they belong to and by what they do, inputs by",
    "what they hold. (In the graph itself and in torch's own logs they have other names.) The",
    "comments are the module's path and the line of your own code. This is text; it does not run.",
)

#: Operators of namespace `lorafx`, without what tells a variant apart.
OPS: Mapping[str, str] = {
    "site": "y + the LoRA delta of one module: the mark that the hook on it leaves",
    "embedding_site": "y + the LoRA delta of an embedding: the mark that the hook on it leaves",
    "conv_site": "y + the LoRA delta of a convolution",
    "grouped_site": "y + the LoRA delta of a product with blocks of a weight",
    "expert_site": "y + the LoRA delta of a product with the weights of routed experts",
    "expert_mark": "says which experts the rows belong to, until `match` has found their product",
    "rows_of": "y, whose row m was computed from row m of x",
    "own_mask": "asks whether each request takes only its own elements",
    "own_linear": "y with the outputs that adapters have weights of their own for",
    "own_embedding": "y with the rows that adapters have of their own in an embedding",
    "fused_linear": "x Wᵀ + b and the deltas of one site, or of a pack of siblings",
    "fused_experts": "a product with the weights of routed experts and its deltas",
    "grouped_mm": "product of sorted rows with the weights of routed experts, by generated C++",
    "dense_mm": "x Wᵀ, of few rows by generated C++",
    "dense_addmm": "x Wᵀ + b, of few rows by generated C++",
    "dense_mm_delta": "x Wᵀ and the deltas, of few rows by generated C++ as one",
    "dense_addmm_delta": "x Wᵀ + b and the deltas, of few rows by generated C++ as one",
    "add_delta": "adds the delta into y in place, in plain aten",
    "add_embedding_delta": "adds the delta of an embedding into y in place, in plain aten",
    "run_delta": "adds the delta into y in place, by generated C++ (kernel-*.cpp)",
    "run_embedding_delta": "adds the delta of an embedding into y in place, by generated C++",
    "run_expert_delta": "adds the delta of routed rows into y in place, by generated C++",
    "expert_slots": "the bank's row of each routed row: its slot and its expert",
    "triton_linear": "x Wᵀ + b and the deltas in one Triton kernel (kernel-*.py)",
    "triton_delta": "adds the delta into y in place, by Triton (kernel-*.py)",
    "triton_embedding_delta": "adds the delta of an embedding into y in place, by Triton",
    "triton_experts": "products with routed experts and their deltas, by Triton",
    "triton_shrink": "v = x Aᵀ, what a delta needs that is added later",
    "triton_activate": "the activation h, and v = h Aᵀ of the linear behind it",
    "triton_expand": "y += v B in place",
    "triton_expanded": "v B + b, into which the vendor's product is added",
    "triton_concat": "v behind the columns of x, and B behind those of W, for one product",
    "add_product": "y += x Wᵀ in place, the vendor's product",
    "paged_cache": "writes keys and values of new tokens into a paged cache, and reads it",
    "paged_attention": "the same, and the attention to it, request by request",
    "stamp": "stands for a layer that is traced once",
    "overwrite": "writes what a stamp gives into the cache of its layer",
    "checked_index": "an index as it is; one that is outside of its table raises",
}

#: Their arguments that shapes alone do not explain.
ARGUMENTS = (
    "slots: of each request the adapter's index in the banks, -1 for the base",
    "rows: how many rows of x each request has; 0 where that is not proved",
    "bank_A (slots, rank, in), bank_B (slots, rank, out): the factors of all adapters that are",
    "loaded; bank_ranks, bank_scales: their real ranks and scales, for each sibling",
)


def legend(
    lines: Iterable[str], symbols: Mapping[str, str], outlined: Sequence[object]
) -> list[str]:
    """The legend of one stage, as comments, from its lines and what the graph's symbols are."""
    text = "\n".join(lines)
    ops = dict.fromkeys(plain_name(name) for name in _OP.findall(text))
    found = [*NAMES]
    found += [f"{name}: {words}" for name, words in symbols.items() if _in_shapes(name, text)]
    found += ARGUMENTS if ops else ()
    found += [f"lorafx.{name}: {OPS[name]}" for name in ops if name in OPS]
    found += [f"one body for layers that are alike: {item}" for item in outlined]
    return ["#", *(f"# {line}" for line in found), "#"]


def plain_name(op: str) -> str:
    """An operator's name without what says that it writes in place, or is run by the interpreter of
    Triton."""
    return op.strip("_").replace("interpreted_", "triton_")


def _in_shapes(symbol: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(symbol)}\b", text) is not None
