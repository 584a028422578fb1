"""The meanings of the words in reports."""

from __future__ import annotations

import re
from collections.abc import Mapping

#: Equal to docs/architecture.md for shared words.
WORDS: Mapping[str, str] = {
    "site": "a module, or a weight of routed experts, that carries LoRA",
    "part": "a range of a site's output columns with a name of its own, such as `q_proj` in a "
    "packed `qkv_proj`",
    "pack": "siblings over one weight buffer; also the node that computes them together",
    "sibling": "one of the sites under one parent that may share an input: q, k and v",
    "node": "an operator of a graph that adds deltas: of one site, or of a pack",
    "bank": "the factors of all slots of one group, on the device",
    "slot": "an adapter's index in all banks; −1 is the base",
    "delta": "what LoRA adds to the output of a site",
    "strategy": "how a node computes its delta (docs/kernels.md)",
    "floor": "least traffic of a node with so many adapters, over the base's weights alone",
    "row": "a vector of a site's input: a token of a request",
    "graph": "what Dynamo captures of one kind of call, compiled",
    "lowering": "what turns graphs into code: `Options.lowering`",
    "pass": "a rewrite of each graph, or a step over the model before that: `lorafx.pipeline()`",
    "outline": "repeated layers that are computed by one body",
    "pinned": "an adapter that keeps its slot: `pin_adapter()`",
    "merged": "an adapter that the base weights hold: `merge()`",
    "refused": "a graph cannot serve an adapter at a site; calls that need it say why",
}


def glossary_of(report: str) -> str:
    """A line for each known word in a report, singular or plural."""
    used = {
        word: meaning
        for word, meaning in WORDS.items()
        if re.search(rf"\b{word}(e?s)?\b", report, re.IGNORECASE)
    }
    width = max(map(len, used), default=0)
    return "\n".join(f"{word:<{width}}  {meaning}" for word, meaning in used.items())
