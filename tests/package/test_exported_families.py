"""The functions that AOTInductor compiles, of several families, against dense merges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, Case, error, valid
from tiny_models import FAMILIES

import lorafx
from lorafx.package.export import _OPTIONS, captured

pytestmark = pytest.mark.any_sizes

#: What the sizes of inputs are beside the number of requests, and their limits.
SIZES: Mapping[str, tuple[set[Any], dict[str, int]]] = {
    "bert": ({"input_ids_1"}, {"input_ids_1": 64}),  # a table of 64 positions
    "gpt2": ({"input_ids_1"}, {}),
    "vit": ({3, 16}, {}),
    "t5": ({"input_ids_1", "decoder_input_ids_1"}, {}),
    "phi3": ({"input_ids_1"}, {}),
}


@pytest.mark.parametrize(
    "family",
    ["vit", *(pytest.param(f, marks=pytest.mark.slow) for f in ("phi3", "gpt2", "t5", "bert"))],
)
def test_mixed_batches_of_other_sizes(case_of: Callable[..., Case], family: str) -> None:
    case, inputs_of = case_of(family), FAMILIES[family].inputs
    config = lorafx.LoraConfig(max_rank=8, max_adapters=6)
    compiled = lorafx.compile(case.model(), config, adapters=case.folders, options=_OPTIONS)
    has_cache = hasattr(case.base.config, "use_cache")
    graph = captured(compiled, {**inputs_of(3, 5), **({"use_cache": False} if has_cache else {})})
    dynamic, limits = SIZES[family]
    assert {size for sizes in graph.shapes for size in sizes} == {"batch", *dynamic}
    assert graph.limits == limits
    run = graph.exported().module(check_guards=False)
    names = ["a1", None, "a0", "a3", "a2"]
    slots = torch.tensor(compiled._session.store.acquire(names), dtype=torch.int32)
    for rows, length in ((5, 6), (1, 3)):
        inputs = inputs_of(rows, length)
        assert list(graph.inputs) == ["slots", *inputs]
        results = run(slots[:rows], *inputs.values())
        got = results[graph.form["items"]["logits"]["tensor"]]
        want = case.expected(names[:rows], inputs)
        assert error(valid(inputs, got), valid(inputs, want)) <= TOLERANCE
    compiled.detach()
