"""torch's fast path of attention, which goes past all marks."""

from __future__ import annotations

import torch

from lorafx.torch_internals.compat import no_mha_fast_path


def test_the_fast_path_of_attention_stays_off_for_whoever_needs_it_last():
    """It is one switch of the process: two models on two threads."""
    assert torch.backends.mha.get_fastpath_enabled()
    with no_mha_fast_path():
        inner = no_mha_fast_path()
        inner.__enter__()
    assert not torch.backends.mha.get_fastpath_enabled()
    inner.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled()
