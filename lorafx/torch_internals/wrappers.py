"""What AOTAutograd puts around a graph without gradients, noted while it does so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="what AOTAutograd puts around a graph is kept with it",
    ended_by="a public aot_autograd whose result can be pickled",
    refused="Options(cache=...)",
)

with private_names():
    from torch._functorch._aot_autograd import graph_compile
    from torch._functorch._aot_autograd.schemas import AOTConfig


def can_be_noted() -> bool:
    """Whether AOTAutograd's wrappers can be kept for another process; from torch 2.13 on."""
    return hasattr(graph_compile, "_cache_inference_info") and hasattr(AOTConfig, "to_cacheable")


@contextmanager
def inference_info_noted() -> Iterator[list[tuple[Any, ...]]]:
    """Note what AOTAutograd is about to cache of each graph that it compiles for this thread:
    configuration, metadata, lowered graph, ..., wrappers. Dynamo's lock is held."""
    found: list[tuple[Any, ...]] = []
    thread = threading.get_ident()
    original: Any = getattr(graph_compile, "_cache_inference_info", None)
    if original is None:
        yield found
        return

    def noting(*arguments: Any) -> Any:
        entry = original(*arguments)  # it makes the metadata ready to keep
        if threading.get_ident() == thread:
            found.append(arguments)
        return entry

    setattr(graph_compile, "_cache_inference_info", noting)  # noqa: B010  for mypy
    try:
        yield found
    finally:
        setattr(graph_compile, "_cache_inference_info", original)  # noqa: B010
