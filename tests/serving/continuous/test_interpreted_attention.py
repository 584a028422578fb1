"""An engine whose attention is computed by the kernels of a GPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
from step_logits import check_three_requests
from torch import Tensor

from lorafx.kernels.cpu import attention as module
from lorafx.kernels.ops.paged_attention import PagedStep
from lorafx.kernels.triton.generated import launch_interpreted
from lorafx.kernels.triton.tiles import ARCHITECTURES
from lorafx.kernels.triton.triton_attention import PagedAttentionSpec, attend


@pytest.mark.slow
def test_logits_of_every_step(eight_of, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers with a window, whose cache is a ring, and of layers without one."""
    used: list[PagedAttentionSpec] = []

    def interpreted(step: PagedStep) -> Tensor:
        spec = PagedAttentionSpec.of(step)
        assert spec is not None
        used.append(spec)
        return attend(launch_interpreted, ARCHITECTURES["interpreter"], spec, step)

    case = eight_of("gemma3", tmp_path, num_hidden_layers=2)
    cm = case.compile()
    monkeypatch.setattr(module, "kernel_of", lambda *_: None)
    monkeypatch.setattr(module, "by_request", interpreted)
    check_three_requests(case, cm)
    assert {spec.ring for spec in used} == {True, False}
