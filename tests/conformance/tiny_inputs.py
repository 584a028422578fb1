"""Arguments for the forward of any tiny model, by its main input."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tiny_configs import VOCAB
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
        return torch.randint(5, vocab - 20, (batch, count), generator=generator)

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
    if _accepts(model, "spatial_shapes"):  # patches, unfolded by the processor
        patch = _first(config, "patch_size", 16)
        found["pixel_values"] = noise(batch, 16, 3 * patch * patch)
        found["pixel_attention_mask"] = torch.ones(batch, 16, dtype=torch.long)
        found["spatial_shapes"] = torch.full((batch, 2), 4)
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
