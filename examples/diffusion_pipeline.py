"""A pipeline of diffusers: one batch of images, each with its own adapters, at its own weights.

python examples/diffusion_pipeline.py                                  # a tiny random SD3
python examples/diffusion_pipeline.py MODEL ink=FILE clay=FILE PROMPT  # yours, from the hub or disk
"""

import copy
import sys
import tempfile

import peft
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft.utils import get_peft_model_state_dict

import lorafx


def serve(folder: str, adapters: dict[str, str], prompt: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder)
    cp = lorafx.compile_pipeline(pipe, adapters)
    names = [None, *adapters, dict.fromkeys(adapters, 0.5)]  # the base, each, half of all
    images = cp(prompt=[prompt] * len(names), adapter_names=names).images
    for number, (name, image) in enumerate(zip(names, images, strict=True)):
        image.save(f"{number}.png")
        print(f"{number}.png: {name or 'base'}")


def tiny(folder: str) -> tuple[StableDiffusion3Pipeline, dict[str, str]]:
    """An SD3 without text encoders, and adapters that diffusers saves."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=8,
        pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    encoders = dict.fromkeys([f"text_encoder{n}" for n in ("", "_2", "_3")])
    encoders |= dict.fromkeys([f"tokenizer{n}" for n in ("", "_2", "_3")])
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, sample_size=8)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = StableDiffusion3Pipeline(transformer, scheduler, vae=vae, **encoders)
    for name in ("ink", "clay"):
        trained = copy.deepcopy(transformer)  # stands for a training run
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        trained.add_adapter(config)
        layers = get_peft_model_state_dict(trained)
        pipe.save_lora_weights(f"{folder}/{name}", transformer_lora_layers=layers)
    return pipe, {name: f"{folder}/{name}" for name in ("ink", "clay")}


def demonstrate() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pipe, adapters = tiny(folder)
        alone = copy.deepcopy(pipe)
        cp = lorafx.compile_pipeline(pipe, adapters)
        for name, path in adapters.items():
            alone.load_lora_weights(path, adapter_name=name)
    names = ["ink", {"ink": 0.5, "clay": 1.0}, "clay"]
    given = {
        f"{sign}{pooled}prompt_embeds": torch.randn(3, *shape)
        for sign in ("", "negative_")
        for pooled, shape in (("", (5, 16)), ("pooled_", (16,)))
    }
    settings = {"num_inference_steps": 2, "height": 8, "width": 8, "output_type": "latent"}
    noise = torch.randn(3, 4, 8, 8)
    images = cp(**given, latents=noise, adapter_names=names, **settings).images
    for row, name in enumerate(names):
        weights = name if isinstance(name, dict) else {name: 1.0}
        alone.set_adapters(list(weights), list(weights.values()))
        own = {key: value[row : row + 1] for key, value in given.items()}
        want = alone(**own, latents=noise[row : row + 1], **settings).images
        torch.testing.assert_close(images[row : row + 1], want, rtol=1e-4, atol=1e-4)
        print(f"image {row}: {name}: as when made alone by diffusers")


if __name__ == "__main__":
    if sys.argv[1:]:
        model, *pairs, text = sys.argv[1:]
        serve(model, dict(pair.split("=", 1) for pair in pairs), text)
    else:
        demonstrate()
