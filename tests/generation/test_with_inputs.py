"""Requests of the engine with images, of a model whose image rows are patches: Qwen3-VL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from dense_merge import REFERENCE, Case, save_adapter
from seeing import HEADS, IDS, SIZES
from tiny import randomise

import lorafx
from lorafx.errors import ConfigError

pytestmark = pytest.mark.any_sizes

IMAGE, START = 5, 6
NEW = 6


def _model() -> Any:
    vision = {
        **{"hidden_size": 16, "intermediate_size": 32, "depth": 2, "num_heads": 2},
        **{"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
        **{"out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = {**SIZES, **HEADS, **IDS, "vocab_size": 64, "rope_parameters": rope}
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        **{"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": 7},
        **{"video_token_id": 8, "tie_word_embeddings": False},
    )
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)
    randomise(model)
    return model


def _inputs(seed: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """A prompt with an image of `height` x `width` patches, which are rows of the tower."""
    generator = torch.Generator().manual_seed(seed)
    places = height * width // 4
    ids = [*torch.randint(10, 64, (3,), generator=generator).tolist(), START]
    ids += [*[IMAGE] * places, 7, *torch.randint(10, 64, (4,), generator=generator).tolist()]
    tokens = torch.tensor([ids])
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == IMAGE).int(),
        "pixel_values": torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder, base = tmp_path_factory.mktemp("patches"), _model()
    targets = {
        "language": ["language_model.layers.0.self_attn.q_proj", "mlp.down_proj"],
        "tower": ["visual.blocks.0.attn.qkv", "visual.blocks.1.mlp.linear_fc1"],
        "connector": ["visual.merger.linear_fc2", "visual.deepstack_merger_list.0.linear_fc1"],
    }
    folders = {
        name: save_adapter(base, folder / name, rank=2, targets=paths, seed=seed, gain=3)
        for seed, (name, paths) in enumerate(targets.items())
    }
    return Case(base, folders)


def test_patches_have_the_adapter_of_their_request(case: Case, monkeypatch) -> None:
    """Images of other sizes, mixed adapters and the base, beside requests of tokens alone."""
    monkeypatch.setenv("LORAFX_START", "eager")
    asked = [
        (None, _inputs(0, 4, 4)),
        ("tower", _inputs(1, 4, 6)),
        ("connector", _inputs(1, 4, 6)),
        ("language", _inputs(2, 2, 2)),
        ("tower", {"input_ids": torch.tensor([[9, 10, 11, 12]])}),
        (None, _inputs(1, 4, 6)),
    ]
    got = []
    cm: Any = lorafx.compile(case.model(), case.folders, options=REFERENCE)
    with cm.continuous_batching(
        continuous_batching_config=transformers.ContinuousBatchingConfig(page_size=4, num_blocks=64)
    ) as engine:
        names = []
        for adapter, inputs in asked:
            more = {"inputs": inputs} if "pixel_values" in inputs else {}
            ids = inputs["input_ids"][0].tolist()
            names.append(engine.add_request(ids, None, NEW, adapter=adapter, **more))
        outputs = engine.collected(names)
        got = [outputs[name].generated_tokens for name in names]
        with pytest.raises(ConfigError, match="has the prompt as `input_ids`"):
            engine.add_request([9, 9], None, NEW, inputs=_inputs(0, 4, 4))
    want = []
    for adapter, inputs in asked:
        model: Any = case.alone(adapter)
        tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        want.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    assert got == want
    assert len({tuple(want[row]) for row in (1, 2, 5)}) == 3  # the adapters change the answer


def test_prompt_lookup_of_the_model_leaves_requests_with_inputs_alone(case: Case) -> None:
    """`generate` would keep the draft's tokens in the cache."""
    inputs = _inputs(0, 2, 2)
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, :1]  # what a draft finds again

    def answer(count: int | None) -> list[int]:
        model = case.model()
        model.generation_config.prompt_lookup_num_tokens = count
        cm: Any = lorafx.compile(model, case.folders, options={**REFERENCE, "start": "eager"})
        config = transformers.ContinuousBatchingConfig(page_size=4, num_blocks=64)
        with cm.continuous_batching(continuous_batching_config=config, warmup=False) as engine:
            prompt = inputs["input_ids"][0].tolist()
            name = engine.add_request(prompt, max_new_tokens=NEW, ignore_eos=True, inputs=inputs)
            return engine.collected([name])[name].generated_tokens

    assert answer(3) == answer(None)
