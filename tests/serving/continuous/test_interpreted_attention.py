"""An engine whose attention is computed by the kernels of a GPU, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
from step_logits import check_three_requests
from torch import Tensor

from lorafx.kernels.cpu import paged_attention as module
from lorafx.kernels.triton.attention_spec import PagedAttentionSpec
from lorafx.kernels.triton.triton_attention import attend
from lorafx.kernels.triton.triton_ops import launch_interpreted
from lorafx.kernels.triton.triton_tiles import ARCHITECTURES


@pytest.mark.slow
def test_logits_of_every_step(eight_of, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers with a window, whose cache is a ring, and of layers without one."""
    used: list[PagedAttentionSpec] = []

    def interpreted(*arguments: Any) -> Tensor:
        query, key, *others, ring, scale, cap, sinks = arguments
        spec = PagedAttentionSpec.of(
            query, key, others[5], capped=cap != 0, sinks=sinks is not None, ring=ring
        )
        assert spec is not None
        used.append(spec)
        arch = ARCHITECTURES["interpreter"]
        return attend(launch_interpreted, arch, spec, query, key, *others, scale, cap, sinks)

    case = eight_of("gemma3", tmp_path, num_hidden_layers=2)
    cm = case.compile()
    monkeypatch.setattr(module, "kernel_of", lambda *_: None)
    monkeypatch.setattr(module, "by_request", interpreted)
    check_three_requests(case, cm)
    assert {spec.ring for spec in used} == {True, False}
