"""Tiny vision-language and audio models on disk, with processors made without the hub."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from dense_merge import Case, save_adapter
from PIL import Image
from tiny import randomise
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

#: Roles, and marks of media: `begin` is what the template writes, `place` what it becomes.
WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "user", "assistant", "system", "<boi>", "<eoi>")
WORDS = (*WORDS, "<place>", "<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**SIZES, **HEADS, **IDS, "vocab_size": 64, "max_position_embeddings": 256}


def tokenizer(image: str, **marks: str) -> PreTrainedTokenizerFast:
    """Each word is a token; `image` is what the template shows for an image or a sound."""
    words = [*WORDS, *(f"w{i}" for i in range(len(WORDS), 64))]
    known = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    shown = (
        "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}"
        f"{image}"
        "{% endif %} {% endfor %}{% endif %} {% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=known,
        **{"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
        pad_token="<pad>",
        extra_special_tokens=marks,
        chat_template=shown,
    )


def gemma3() -> tuple[Any, Any]:
    """A model whose images have one mask of all directions, and its processor."""
    vision = {**SIZES, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 8, "tie_word_embeddings": False},
        vision_config=vision,
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
        **{"boi_token_index": 7, "eoi_token_index": 8, "image_token_index": 9},
    )
    marks = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<place>"}
    reader = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = transformers.Gemma3Processor(
        reader, tokenizer("<boi>", **marks), image_seq_length=4
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def qwen2_audio() -> tuple[Any, Any]:
    """A model of sounds, whose connector is a linear layer, and its processor."""
    audio = {
        **{"num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2},
        **{"encoder_ffn_dim": 32, "max_source_positions": 50},
    }
    config = transformers.Qwen2AudioConfig(
        audio_config=transformers.Qwen2AudioEncoderConfig(**audio),
        text_config=transformers.Qwen2Config(**TEXT),
        audio_token_index=12,
    )
    reader = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    shown = "<|audio_bos|> <|AUDIO|> <|audio_eos|>"
    marks = {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    marks["audio_token"] = "<|AUDIO|>"
    words = tokenizer(shown, **marks)
    # Without it the class's own template is saved.
    processor = transformers.Qwen2AudioProcessor(reader, words, chat_template=words.chat_template)
    return transformers.Qwen2AudioForConditionalGeneration(config), processor


def write(folder: Path, made: tuple[Any, Any], targets: dict[str, Sequence[str]]) -> Case:
    """A model with an adapter of each name, of these paths' suffixes, in `folder`."""
    torch.manual_seed(0)
    model, processor = made
    model.eval().requires_grad_(False)
    randomise(model)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    folders = {
        name: save_adapter(model, folder / name, rank=2, targets=paths, seed=seed, gain=2)
        for seed, (name, paths) in enumerate(targets.items())
    }
    return Case(model, folders)


def image(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(picture: Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url(data)}}


def sound(seed: int, samples: int = 1600, rate: int = 16000, width: int = 2) -> bytes:
    """A wav file of noise."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, width, rate, 0, "NONE", ""))
        out.writeframes(np.random.default_rng(seed).bytes(width * samples))
    return file.getvalue()


def sound_part(data: bytes) -> dict[str, Any]:
    given = {"data": base64.b64encode(data).decode(), "format": "wav"}
    return {"type": "input_audio", "input_audio": given}
