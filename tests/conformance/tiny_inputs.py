"""Arguments for the forward of any tiny model, by its main input."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from tiny_configs import IMAGE_TOKEN, VOCAB
from torch import nn
from transformers import PretrainedConfig


def inputs(
    model: nn.Module, kind: str, batch: int, length: int, *, seed: int = 0, padding: bool = True
) -> dict[str, torch.Tensor]:
    """Arguments of a forward with `batch` requests, by the model's main input.

    Texts have `length` tokens, of which row 0 loses one to padding on the right when `padding`.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    vocab = min(_vocab(config), VOCAB)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(5, min(vocab - 20, IMAGE_TOKEN), (batch, count), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    main = getattr(model, "main_input_name", "input_ids")
    if main == "inputs":
        main = {"image": "pixel_values", "seq2seq": "input_values"}.get(kind, main)
    found: dict[str, torch.Tensor] = {}
    if main == "pixel_values":
        size = _first(config, "image_size", 32)
        width = size if isinstance(size, int) else size[-1]
        height = size if isinstance(size, int) else size[0]
        width, height = (min(max(side, 32), 64) for side in (width, height))
        channels = _first(config, "num_channels", 3)
        found["pixel_values"] = noise(batch, channels, height, width)
    elif main == "flattened_patches":  # each behind its row and column
        patches = noise(batch, 16, 2 + _first(config, "patch_embed_hidden_size", 16))
        patches[..., :2] = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        found = {main: patches, "decoder_input_ids": tokens(4)}
    elif main == "input_features":
        found["input_features"] = noise(batch, *_feature_shape(config))
    elif main == "input_values":
        if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
            found["input_values"] = noise(batch, config.max_length, config.num_mel_bins)
        else:
            found["input_values"] = noise(batch, 2000)
    else:
        found["input_ids"] = tokens(length)
        if _accepts(model, "attention_mask"):
            mask = torch.ones(batch, length, dtype=torch.long)
            if padding and length > 2:
                mask[0, -1] = 0
            found["attention_mask"] = mask
    if kind == "image-text" and _accepts(model, "pixel_values"):
        found = _with_images(model, found, tokens, noise)
    if _accepts(model, "spatial_shapes"):  # patches, unfolded by the processor
        patch = _first(config, "patch_size", 16)
        found["pixel_values"] = noise(batch, 16, 3 * patch * patch)
        found["pixel_attention_mask"] = torch.ones(batch, 16, dtype=torch.long)
        found["spatial_shapes"] = torch.full((batch, 2), 4)
        if kind == "image-text":
            _put_before(found, torch.full((batch, 16 // config.downsample_factor**2), IMAGE_TOKEN))
    if hasattr(config, "codec_config"):  # a text token and the codes of a frame, side by side
        found["input_ids"] = found["input_ids"][..., None].repeat(1, 1, config.num_codebooks + 1)
    if hasattr(config, "default_num_delay_tokens"):  # audio in step with the text
        frames = 2 * config.downsample_factor * length
        found["input_features"] = noise(batch, _first(config, "num_mel_bins", 16), frames)
    if kind == "seq2seq" and _accepts(model, "decoder_input_ids"):
        channels = getattr(getattr(config, "decoder_config", None), "num_channels", None)
        ids = tokens(max(2, length - 1))
        found["decoder_input_ids"] = ids if channels is None else ids[..., None] % channels
        if channels is not None:
            found["decoder_input_ids"] = found["decoder_input_ids"].repeat(1, 1, channels)
    return found


def _with_images(
    model: nn.Module,
    text: dict[str, torch.Tensor],
    tokens: Callable[[int], torch.Tensor],
    noise: Callable[..., torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The text behind an image a request, in the first form that the model takes; without images
    where it takes none of them."""
    found = dict(text)
    ids = found.setdefault("input_ids", tokens(6))
    if _accepts(model, "decoder_input_ids") or not _accepts(model, "input_ids"):
        found["decoder_input_ids"] = tokens(4)
    batch = len(ids)
    size = _first(model.config, "image_size", 32)
    size = min(size if isinstance(size, int) else size[0], 64)
    channels = _first(model.config, "num_channels", 3)
    if _accepts(model, "qformer_input_ids"):
        found["qformer_input_ids"] = tokens(4)
    if _accepts(model, "bbox"):  # of each token, none of a size that stands for no box
        corners = noise(batch, ids.shape[1], 2).sigmoid() * 0.5
        found["bbox"] = torch.cat([corners, corners + 0.3], -1)
    for shape in ((batch, channels, size, size), (batch, 1, channels, size, size)):
        images = {"pixel_values": noise(*shape)}
        for count in _counts(model, images, size):
            arguments = {**found, **images}
            _put_before(arguments, torch.full((batch, count), IMAGE_TOKEN))
            if _accepts(model, "image_attention_mask"):  # which tokens see which image
                length = arguments["input_ids"].shape[1]
                arguments["image_attention_mask"] = torch.ones(batch, length, 1, dtype=torch.long)
            if _accepts(model, "image_embeds_position_mask"):
                seen = arguments["input_ids"] == IMAGE_TOKEN
                arguments["image_embeds_position_mask"] = seen.long()
            if not _accepts(model, "input_ids"):
                del arguments["input_ids"]
            elif _accepts(model, "token_type_ids"):  # as processors give them
                arguments["token_type_ids"] = torch.zeros_like(arguments["input_ids"])
            if _sees(model, arguments):
                return arguments
    return {**text, "input_ids": ids}


def _put_before(arguments: dict[str, torch.Tensor], marks: torch.Tensor) -> None:
    """Put these tokens before the text."""
    arguments["input_ids"] = torch.cat([marks, arguments["input_ids"]], 1)
    if "attention_mask" in arguments:
        ones = torch.ones_like(marks)
        arguments["attention_mask"] = torch.cat([ones, arguments["attention_mask"]], 1)


def _counts(model: nn.Module, images: dict[str, torch.Tensor], size: int) -> list[int]:
    """How many tokens of the text an image may stand for, the likeliest first."""
    patch = _first(model.config, "patch_size", 8)
    patches = (size // patch) ** 2 if isinstance(patch, int) else None
    named = ("mm_tokens_per_image", "num_query_tokens", "image_seq_length", "image_seq_len")
    named += ("latent_query_num",)
    found = [_image_tokens(model, images), 0, patches]
    found += [getattr(model.config, name, None) for name in named]
    return list(dict.fromkeys(count for count in found if isinstance(count, int) and count < 600))


@torch.no_grad()
def _image_tokens(model: nn.Module, images: dict[str, torch.Tensor]) -> int | None:
    """How many tokens of the text an image stands for; None where the model does not say."""
    try:
        output = model.get_image_features(**images)
        features = getattr(output, "pooler_output", output)
        if not isinstance(features, torch.Tensor):
            features = torch.cat(list(features))
        return features.shape[:-1].numel() // len(images["pixel_values"])
    except Exception:
        return None


@torch.no_grad()
def _sees(model: nn.Module, arguments: dict[str, torch.Tensor]) -> bool:
    """Whether the model runs with the images, and its answer depends on them."""
    try:
        first = model(**arguments)["logits"]
        other = model(**{**arguments, "pixel_values": -arguments["pixel_values"]})["logits"]
    except Exception:
        return False
    return not torch.equal(first, other)


def _feature_shape(config: PretrainedConfig) -> tuple[int, int]:
    """(bins, frames) of encoders with a fixed number of positions, else (frames, bins)."""
    for name in ("feature_projection_input_dim", "input_feat_per_channel"):
        if hasattr(config, name):
            return 32, getattr(config, name)
    bins, positions = _first(config, "num_mel_bins", 16), _first(config, "max_source_positions", 0)
    return (bins, 2 * positions) if positions else (32, bins)


def _accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _vocab(config: PretrainedConfig) -> int:
    value = _first(config, "vocab_size", VOCAB)
    return value if isinstance(value, int) else VOCAB


def _first(config: PretrainedConfig, name: str, default: Any) -> Any:
    """The field in the configuration or the first of its parts that has it."""
    pending = [config]
    while pending:
        current = pending.pop(0)
        value = getattr(current, name, None)
        if value is not None:
            return value
        pending += [v for v in vars(current).values() if isinstance(v, PretrainedConfig)]
    return default
