"""Steps of an engine in the graphs that a GPU would have: torch's `scaled_dot_product_attention` is
traced as the operators that it becomes there, which nothing on a CPU could run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from step_logits import check_three_requests
from toolchain import needs_compiler
from torch import Tensor
from torch._C import DispatchKey

pytestmark = pytest.mark.any_sizes

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's native/transformers/attention.cpp, `preprocess_mask`: rows of the mask begin at
    multiples of eight."""
    assert attn_mask is not None
    count = attn_mask.shape[-1]
    padded = aten.constant_pad_nd.default(attn_mask, [0, 8 - count % 8], 0.0)
    mask = padded[..., :count].expand(*query.shape[:3], count)
    found = aten._scaled_dot_product_efficient_attention.default(
        query, key, value, mask, False, dropout_p, is_causal, scale=scale
    )
    return found[0]


@pytest.fixture
def traced_as_on_a_gpu() -> Iterator[None]:
    key = DispatchKey.CompositeImplicitAutograd
    SDPA.py_impl(key)(efficient)
    SDPA._dispatch_cache.clear()
    yield
    del SDPA.py_kernels[key]
    SDPA._dispatch_cache.clear()


@needs_compiler
@pytest.mark.usefixtures("traced_as_on_a_gpu")
def test_logits_of_every_step(llama, tmp_path) -> None:
    """Lengths that are no multiples of eight, for which torch pads the mask, and cuts it."""
    cm = llama.compile({"dump": str(tmp_path)})
    check_three_requests(llama, cm)
    for graph in tmp_path.glob("graph-*"):
        before = next(graph.glob("*-match.py")).read_text()
        after = next(graph.glob("*-attend.py")).read_text()
        assert "_scaled_dot_product_efficient_attention" in before
        assert "constant_pad_nd" in before
        assert after.count("lorafx.paged_attention.default") == 1
        assert "constant_pad_nd" not in after
        assert "lorafx.paged_cache.default" not in after
