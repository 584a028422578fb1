"""A vision-language model around a text model, whose layers have names that both parts have."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration


def llava(text: nn.Module, hidden: int) -> nn.Module:
    """A vision-language model around a text model's configuration."""
    vision = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(vision_config=vision, text_config=text.config, image_token_id=1)
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    return model
