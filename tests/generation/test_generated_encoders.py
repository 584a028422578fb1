"""Florence-2's class has a step of `generate` of its own: images are encoded, and put into the text
that the encoder takes."""

from __future__ import annotations

import oracle
import pytest
import torch
from dense_merge import TOLERANCE, Case, error, random_base, save_adapter
from tiny_models import VOCAB, Family
from torch import nn
from transformers import Florence2Config, Florence2ForConditionalGeneration

pytestmark = pytest.mark.any_sizes

FIXED = {"eos_token_id": None, "pad_token_id": 1, "min_new_tokens": 2, "max_new_tokens": 2} | {
    "do_sample": False, "return_dict_in_generate": True, "output_logits": True
}  # fmt: skip
IMAGE, FEATURES = 60, 17


def florence2() -> nn.Module:
    layers = {
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 40}.items()
    }
    text = {"model_type": "bart", "vocab_size": VOCAB, "d_model": 24, "pad_token_id": 1, **layers}
    vision = {"depths": (1, 1), "embed_dim": (16, 32), "num_heads": (2, 2), "num_groups": (2, 2)}
    patches = {"patch_size": (3, 3), "patch_stride": (2, 2), "patch_padding": (1, 1)}
    vision |= {**patches, "patch_prenorm": (False, True), "window_size": 4, "projection_dim": 24}
    vision |= {"max_temporal_embeddings": 4, "max_position_embeddings": 8}
    config = Florence2Config(
        text_config={**text, "max_position_embeddings": 64},
        vision_config=vision,
        image_token_id=IMAGE,
    )
    return Florence2ForConditionalGeneration(config)


@pytest.mark.slow
def test_adapters_of_the_vision_tower_the_encoder_and_the_decoder(tmp_path):
    base = random_base(Family(florence2, ()))
    targets = {
        "v": r".*(vision_tower|multi_modal_projector).*",
        "e": r".*encoder\.layers.*(q_proj|fc1)",
        "d": r".*decoder\.layers.*(q_proj|v_proj|fc1)",
    }
    folders = {
        name: save_adapter(base, tmp_path / name, rank=2, targets=chosen, seed=seed, gain=2)
        for seed, (name, chosen) in enumerate(targets.items())
    }
    case = Case(base, folders)
    cm, names = case.compile(), ["v", None, "e", "d"]
    torch.manual_seed(0)
    ids = torch.randint(3, IMAGE, (4, FEATURES + 4))
    ids[:, :FEATURES] = IMAGE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["pixel_values"] = torch.randn(4, 3, 16, 16)
    for mixed in (names, ["d", "v", "v", None]):
        got = cm.generate(**batch, **FIXED, adapter_names=mixed)
        for row, name in enumerate(mixed):
            want = case.alone(name).generate(**oracle.one_row(batch, row), **FIXED)
            assert torch.equal(got.sequences[row], want.sequences[0])
            assert error(torch.stack(got.logits)[:, row], torch.cat(want.logits)) <= TOLERANCE
