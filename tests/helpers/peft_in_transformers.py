"""Tests of transformers' own `load_adapter` and `add_adapter`, which refuse a PEFT that is too old
for them: transformers 5.24 wants PEFT 0.22."""

from __future__ import annotations

import pytest
from transformers.integrations.peft import MIN_PEFT_VERSION

from lorafx.torch_internals.versions import installed, numbers

needs_its_peft = pytest.mark.skipif(
    numbers(installed("peft") or "") < numbers(MIN_PEFT_VERSION),
    reason=f"this transformers takes no PEFT before {MIN_PEFT_VERSION}",
)
