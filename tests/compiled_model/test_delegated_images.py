"""Models of images and text: methods, and what `generate` has encoded before its first forward."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from dense_merge import REFERENCE, error, random_base, save_adapter
from tiny_models import Family, token_inputs
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from waiting import LONG

import lorafx
from lorafx.errors import MatchError

#: A prompt and a step: two sizes.
SHORT = {"pad_token_id": 0, "eos_token_id": None, "min_new_tokens": 2, "max_new_tokens": 2}
LOGITS = {**SHORT, "return_dict_in_generate": True, "output_logits": True}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1} | {
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4
}  # fmt: skip
TEXT = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 61}


def clip() -> nn.Module:
    text = {**TEXT, "intermediate_size": 20, "eos_token_id": 60}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=10))


def llava() -> nn.Module:
    text = LlamaConfig(**TEXT, intermediate_size=20, num_key_value_heads=1)
    vision = CLIPVisionConfig(**VISION, projection_dim=12)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=60, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config)


def blip2() -> nn.Module:
    text = {**TEXT, "model_type": "opt", "ffn_dim": 20, "word_embed_proj_dim": 12}
    former = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=VISION,
            qformer_config={**former, "intermediate_size": 20, "encoder_hidden_size": 16},
            text_config={**text, "max_position_embeddings": 64},
            num_query_tokens=4,
            image_token_index=60,
        )
    )


@pytest.fixture
def built(tmp_path: Path) -> Any:
    """A model with an adapter "v" of its vision tower and "l" of its language model, and others of
    given targets."""

    def make(build: Any, **others: Any) -> tuple[Any, dict[str | None, Any]]:
        base = random_base(Family(build, token_inputs, (), {}))
        vision = r".*vision.*(q_proj|qkv|fc1|projector|visual_projection)"
        vision += r"|qformer.*(query|dense)|language_projection"
        language = r".*(language|text)_model.*(q_proj|fc1|up_proj)"
        folders = {
            name: save_adapter(base, tmp_path / name, rank=2, targets=targets, seed=2, gain=2)
            for name, targets in {"v": vision, "l": language, **others}.items()
        }
        merged = {name: oracle.merged(base, folder) for name, folder in folders.items()}
        cm = lorafx.compile(copy.deepcopy(base), folders, options=REFERENCE)
        return cm, {None: base, **merged}

    return make


def test_features_of_images_and_texts(built):
    cm, alone = built(clip)
    torch.manual_seed(0)
    inputs = {"pixel_values": torch.randn(3, 3, 8, 8), **token_inputs(3, 5)}
    pictures = {"pixel_values": inputs.pop("pixel_values")}
    for method, given, name in (
        ("get_image_features", pictures, "v"),
        ("get_text_features", inputs, "l"),
    ):
        want = {key: getattr(model, method)(**given).pooler_output for key, model in alone.items()}
        assert error(want[name], want[None]) > 1e-3
        got = getattr(cm, method)(**given, adapter_names=[name, None, name]).pooler_output
        assert (
            error(got, torch.stack([want[n][i] for i, n in enumerate((name, None, name))])) < 1e-5
        )
        cm.set_adapter(name)
        assert error(getattr(cm, method)(**given).pooler_output, want[name]) < 1e-5
        cm.set_adapter(None)
        assert torch.equal(getattr(cm, method)(**given).pooler_output, want[None])


@contextmanager
def another_thread_that_compiles() -> Iterator[None]:
    """torch.compiler.is_compiling() is true on all threads then."""
    begun, done = threading.Event(), threading.Event()

    def backend(graph: Any, examples: Any) -> Any:
        begun.set()
        assert done.wait(LONG)
        return graph

    add = torch.compile(lambda x: x + 1, backend=backend)
    (thread := threading.Thread(target=add, args=(torch.ones(2),))).start()
    assert begun.wait(LONG)
    try:
        assert torch.compiler.is_compiling()
        yield
    finally:
        done.set()
        thread.join(LONG)


def images(rows: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(3, 59, (rows, 9))
    ids[:, 1:5] = 60
    pixels = torch.randn(rows, 3, 8, 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.slow
def test_generate_encodes_images_with_the_adapter(built):
    """transformers has `get_image_features` run before the first forward."""
    cm, alone = built(llava)
    batch = images(2)
    for name in ("v", "l", None):
        want = alone[name].generate(**batch, **SHORT)
        assert (name is None) == torch.equal(want, alone[None].generate(**batch, **SHORT))
        assert torch.equal(cm.generate(**batch, **SHORT, adapter_names=[name] * 2), want)


@pytest.mark.slow
def test_images_of_a_model_that_was_never_called_belong_to_their_requests(built):
    """Its first call registers hooks for the hidden states of the vision tower."""
    cm, alone = built(llava)
    batch, names = images(3), ["v", None, "l"]
    got = cm(**batch, adapter_names=names)
    want = [alone[name](**oracle.one_row(batch, row)).logits for row, name in enumerate(names)]
    assert error(got.logits, torch.cat(want)) < 1e-5
    tokens = cm.generate(**batch, **SHORT, adapter_names=names)
    for row, name in enumerate(names):
        want = alone[name].generate(**oracle.one_row(batch, row), **SHORT)
        assert torch.equal(tokens[row : row + 1], want)


@pytest.mark.slow
def test_generate_of_a_model_inside_of_the_model(built):
    """BLIP-2's own `generate` never calls its forward, but its parts, and the `generate` of its
    language model."""
    cm, alone = built(blip2, e=["embed_tokens", "fc2"])
    batch = images(3)
    want = {name: alone[name].generate(**batch, **LOGITS) for name in ("v", "l", "e", None)}
    for name in ("v", "l", "e"):
        assert error(want[name].logits[0], want[None].logits[0]) > 1e-3
    for names in (["v", None, "l"], ["v", "e", None]):
        got = cm.generate(**batch, **LOGITS, adapter_names=names)
        for row, name in enumerate(names):
            assert torch.equal(got.sequences[row], want[name].sequences[row])
            for step, logits in enumerate(got.logits):
                assert error(logits[row], want[name].logits[step][row]) < 1e-5
    captured = cm.recompiles
    got = cm.generate(**batch, **LOGITS, adapter_names=["l", "v", "v"])
    assert error(got.logits[0][1:], want["v"].logits[0][1:]) < 1e-5
    assert cm.recompiles == captured
    assert torch.equal(cm.generate(**batch, **SHORT), want[None].sequences)
    cm.set_adapter("v")
    assert torch.equal(cm.generate(**batch, **SHORT), want["v"].sequences)
    with another_thread_that_compiles():
        assert torch.equal(cm.generate(**batch, **SHORT), want["v"].sequences)
    with pytest.raises(MatchError, match=r"vision_model\S* \(Linear\) runs outside.*'v' is the"):
        cm._orig_mod.vision_model(batch["pixel_values"])


@pytest.mark.usefixtures("road")
def test_a_hook_on_a_part_that_generate_calls_by_itself_runs_once(built):
    """That of a site ran in its graph, and around it."""
    cm, alone = built(blip2)
    batch, calls = images(2), []

    def halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls.append(module)
        return output / 2

    for model in (cm._orig_mod, alone["v"]):
        model.language_projection.register_forward_hook(halve)
    want = alone["v"].generate(**batch, **LOGITS)
    del calls[:]
    got = cm.generate(**batch, **LOGITS, adapter_names=["v"] * 2)
    assert error(got.logits[0], want.logits[0]) < 1e-5
    assert len(calls) == 1
