"""Images of prompts of `generate` in a mixed batch."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from tiny_inputs import inputs

import lorafx

SHORT = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
NAMES = ["all", None, "even"]


@pytest.mark.slow
def test_images_of_prompts_with_different_adapters(tmp_path):
    """The forward encodes the images: whose features those are is proved inside of it alone."""
    family = next(f for f in tiny.families("image-text") if f.model_type == "llava")
    model = tiny.build(family)
    batch = inputs(model, family.kind, len(NAMES), 6, padding=False)
    assert len(batch["pixel_values"]) == len(NAMES)
    adapters = oracle.standard_adapters(model, tmp_path)
    reference = oracle.Oracle.of(model, adapters)
    cm = lorafx.compile(model, adapters, options={"lowering": "reference"})
    got = cm.generate(**batch, **SHORT, adapter_names=NAMES)
    base = reference.base.generate(**batch, **SHORT)
    for row, name in enumerate(NAMES):
        one = oracle.one_row(batch, row)
        want = reference.model(name).generate(**one, **SHORT)[0]
        assert torch.equal(got[row], want)
        assert (name is None) == torch.equal(want, base[row])
