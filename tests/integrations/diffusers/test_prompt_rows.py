"""Which prompt a row belongs to, found by what a pipeline does with embeddings and noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafx.errors import BatchError
from lorafx.integrations.diffusers.followed_prompts import PromptRows


def given(prompts: int) -> tuple[PromptRows, Tensor]:
    rows, embeddings = PromptRows(prompts), torch.ones(prompts, 3, 4)
    rows.label_prompts(embeddings)
    return rows, embeddings


@pytest.mark.quick
def test_noise_has_the_prompt_of_its_row_from_then_on() -> None:
    rows, embeddings = given(2)

    def pipeline() -> tuple[int, ...]:
        noise = torch.randn(2, 4)
        assert rows.owners("a denoiser", (noise, embeddings.flip(0)), 2) == (1, 0)
        return rows.owners("a denoiser", noise - 0.5 * noise, 2)

    assert rows.run(pipeline) == (1, 0)


def test_one_noise_for_all_prompts_says_nothing() -> None:
    rows, embeddings = given(2)

    def pipeline() -> tuple[int, ...]:
        noise = torch.randn(1, 4).repeat(2, 1)
        assert rows.owners("a denoiser", (noise, embeddings), 2) == (0, 1)
        return rows.owners("a denoiser", noise, 2)

    with pytest.raises(BatchError, match="2 rows for 2 prompts, and no prompt is known for row 0"):
        rows.run(pipeline)


def test_a_row_of_several_prompts_is_refused() -> None:
    rows, embeddings = given(2)

    def pipeline() -> tuple[int, ...]:
        return rows.owners("a denoiser", (embeddings, embeddings.flip(0)), 2)

    with pytest.raises(BatchError, match="its arguments name several prompts for row 0, 1"):
        rows.run(pipeline)
