"""Images in mixed batches: any number of them a request, and prompts of `generate` with them."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import tiny
import torch
from dense_merge import REFERENCE, error
from tiny_configs import IMAGE_TOKEN
from tiny_inputs import inputs
from torch import Tensor

import lorafx
from lorafx.errors import BatchError

LENGTH, SHARED = 12, {"pixel_values": None, "image_grid_thw": None}


def several(model: torch.nn.Module, numbers: tuple[int, ...]) -> dict[str, Tensor]:
    """Texts with so many images each, of 4 patches by 4, which stand for 4 tokens."""
    config, vision = model.config, model.config.vision_config
    ids = torch.randint(5, 80, (len(numbers), LENGTH))
    for row, number in zip(ids, numbers, strict=True):
        for start in range(1, 1 + 5 * number, 5):
            row[start], row[start + 1 : start + 5] = config.vision_start_token_id, IMAGE_TOKEN
    side = 2 * vision.spatial_merge_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(sum(numbers) * side * side, width),
        "image_grid_thw": torch.tensor([[1, side, side]] * sum(numbers)),
    }


@pytest.mark.slow
def test_requests_have_images_of_any_number(tmp_path: Path) -> None:
    """Patches of all in one list, which the requests share (`row_dims`); adapters of the text."""
    torch.manual_seed(0)
    family = next(f for f in tiny.families("image-text") if f.model_type == "qwen2_vl")
    model = tiny.build(family)
    text = [path for path in oracle.linears(model) if "visual" not in path]
    folders = {
        name: oracle.save_adapter(model, tmp_path / name, rank=rank, targets=text, seed=rank)
        for name, rank in (("a", 3), ("b", 4))
    }
    merged = oracle.Oracle.of(model, folders)
    batch, names = several(model, (2, 0, 1)), ["a", None, "b"]
    plain = lorafx.compile(tiny.build(family), adapters=folders, options=REFERENCE)
    with pytest.raises(BatchError, match=r"'pixel_values' .* \(any number of images per request\)"):
        plain(**batch, adapter_names=names)
    config = lorafx.LoraConfig(target_modules=text, row_dims=SHARED)
    cm = lorafx.compile(model, config, adapters=folders, options=REFERENCE)
    for names, numbers in ((["a", None, "b"], (2, 0, 1)), (["b", "a", None, "a"], (0, 1, 1, 1))):
        batch = several(model, numbers)
        found = cm(**batch, adapter_names=names).logits
        with torch.no_grad():
            wholes = [merged.model(name)(**batch).logits for name in names]
        expected = torch.stack([whole[index] for index, whole in enumerate(wholes)])
        assert error(found, expected) <= 1e-5
        base = merged.base(**batch).logits
        assert error(found[0], base[0]) > 1e-3


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
