"""diffusers' pipelines over tiny random models, and adapters that diffusers itself saves.

SDXL's UNet with two CLIP encoders, Flux's transformer with CLIP and T5, SD3's without its encoders,
as it is loaded to save memory. Tokenizers are CLIP's class over a vocabulary of letters.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

TEXT = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "projection_dim": 8}
LENGTH = 6  # tokens of a prompt
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "transformer": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "v_proj", "out_proj"],
    "text_encoder_2": ["q_proj", "v_proj", "out_proj"],
}


def tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate([*words, *special])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def clip(projected: bool, layers: int = 2) -> nn.Module:
    config = CLIPTextConfig(
        **TEXT,
        num_hidden_layers=layers,
        vocab_size=54,
        max_position_embeddings=LENGTH,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        hidden_act="gelu",
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_ff": 12, "d_kv": 4, "num_heads": 2, "num_layers": 1}
    return T5EncoderModel(T5Config(**sizes, vocab_size=54))


def vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=1, latent_channels=channels, sample_size=8
    )


def unet(**fields: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8,),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=4,
        norm_num_groups=4,
        **fields,
    )


def sdxl() -> DiffusionPipeline:
    return StableDiffusionXLPipeline(
        unet=unet(
            mid_block_type=None,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 8,
            cross_attention_dim=16,
        ),
        scheduler=EulerDiscreteScheduler(),
        vae=vae(4),
        text_encoder=clip(False),
        tokenizer=tokenizer(),
        text_encoder_2=clip(True),
        tokenizer_2=tokenizer(),
        add_watermarker=False,
    )


def sd3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=8,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux_transformer() -> FluxTransformer2DModel:
    """Of hidden size 16."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )


def flux() -> DiffusionPipeline:
    return FluxPipeline(
        transformer=flux_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        text_encoder=clip(False, layers=1),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )


PIPELINES = {"sdxl": sdxl, "sd3": sd3, "flux": flux}


def pipeline(kind: str) -> Any:
    torch.manual_seed(0)
    pipe = PIPELINES[kind]()
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


#: Latents of 8 by 8, after two steps.
CALL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
SIZES = {"sdxl": 8, "sd3": 8, "flux": 16}


def noise(images: range) -> list[torch.Generator]:
    """Each image has noise of its own, alone as in a batch."""
    return [torch.Generator().manual_seed(image) for image in images]


@dataclass
class Adapted:
    """A pipeline that diffusers itself gives one request's adapters: the oracle."""

    kind: str
    pipe: Any
    folders: dict[str, Path]

    def loads(self, folders: dict[str, Path]) -> None:
        for name, folder in folders.items():
            with logged_errors_only():
                self.pipe.load_lora_weights(str(folder), adapter_name=name)
        self.folders |= folders

    def images(
        self, adapter: str | Mapping[str, float] | None, images: range, **call: Any
    ) -> torch.Tensor:
        """The images of one prompt, with these adapters alone."""
        weights = {adapter: 1.0} if isinstance(adapter, str) else dict(adapter or {})
        # One that the text encoders lack has no part there, which `set_adapters` says each time.
        with logged_errors_only():
            if weights:
                self.pipe.enable_lora()
                self.pipe.set_adapters(list(weights), list(weights.values()))
            else:
                self.pipe.disable_lora()
            size = SIZES[self.kind]
            call = {**CALL, "height": size, "width": size, **call}
            call = {name: value for name, value in call.items() if value is not None}
            return self.pipe(generator=noise(images), **call).images


@contextmanager
def logged_errors_only() -> Iterator[None]:
    """Without what transformers 5 logs of base weights that an adapter's file does not have."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def save_lora(pipe: Any, folder: Path, seed: int, parts: Sequence[str], rank: int = 2) -> Path:
    """An adapter of these components, with random factors, as the pipeline's class saves it."""
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, Any] = {}
    for part in parts:
        model = copy.deepcopy(getattr(pipe, part))
        config = peft.LoraConfig(r=rank, lora_alpha=3, target_modules=TARGETS[part])
        model.add_adapter(config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        layers[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(str(folder), **layers)
    return folder


def as_kohya(file: Path, alpha: float) -> dict[str, torch.Tensor]:
    """What diffusers saved, as sd-scripts names it."""
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    found = {}
    for key, tensor in load_file(file).items():
        part, _, rest = key.partition(".")
        path, _, factor = rest.partition(".lora_")
        name = f"{prefixes[part]}_{path.replace('.', '_')}"
        found[f"{name}.lora_{'down' if factor[0] == 'A' else 'up'}.weight"] = tensor
        found[f"{name}.alpha"] = torch.tensor(alpha)
    return found
