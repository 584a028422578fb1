"""Tiny random models of (nearly) any transformers class, and inputs for them.

    default config --shrink--> small config --> random weights of unit gain, seeded, eval, fp32

The shrinking is by field name: widths, depths, heads, vocabularies, experts, image sizes, in
nested configurations too. `OVERRIDES` holds what no rule gives. Weights are drawn with unit gain
(std 1/√fan_in), not with the 0.02 of pretraining: activations stay near 1, so that a difference of
1e-5 in the output means something.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB, EXPERTS = 64, 96, 4, 2, 16, 2, 128, 4

#: (pattern of the field's name, value). The first that matches wins; None leaves the default.
RULES: tuple[tuple[str, Any], ...] = (
    (r"(bos|decoder_start|forced_bos)_token_id", 1),
    (r"(eos|sep|cls|forced_eos)_token_id", 2),
    (r"pad_token_id", 0),
    (r"mask_token_id", 4),
    # counts that look like widths
    (r"num_hidden_groups|inner_group_num|layer_type_size|num_embed_hash_functions", None),
    (r"type_vocab_size|task_type_vocab_size|composer_vocab_size", None),
    (r"chunk_size_feed_forward|chunk_size_lm_head|num_codebooks|codebook_size", None),
    (r"hidden_size_per_layer_input", 16),
    (r".*vocab_size.*", VOCAB),
    (r"qk_rope_head_dim|qk_nope_head_dim|rope_head_dim|nope_head_dim", 8),
    (r"qk_head_dim|v_head_dim|linear_(key|value)_head_dim|index_head_dim", HEAD_DIM),
    (r"q_lora_rank|o_lora_rank", 32),
    (r"kv_lora_rank", HEAD_DIM),
    (r"linear_num_(key|value)_heads|index_n_heads|lightning_nope_heads", HEADS),
    (r"index_topk", 8),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size|mamba_d_ssm_state", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", HEADS),
    (r"mamba_d_head|mamba_head_dim", 32),
    (r"(mamba_)?n_groups|(mamba_)?ngroups|n_group|topk_group|num_expert_group", 1),
    (r"mamba_chunk_size|chunk_size", 4),
    (r"time_step_rank|mamba_dt_rank", 8),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|n_experts_per_tok", 2),
    (r"(moe_)?num_(local_|routed_)?experts|n_routed_experts|n_experts", EXPERTS),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"zero_expert_num", 2),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (
        r"(moe|shared_expert|shared|expert_ffn|shared_experts|expert).*(intermediate|hidden)_size",
        32,
    ),
    (r".*num_key_value_heads|n_kv_heads|multi_query_heads|num_kv_heads", KV_HEADS),
    (
        r".*(num_attention_heads|attention_heads|num_heads)|n_head|n_heads|conf_num_attention_heads",
        HEADS,
    ),
    (
        r"(global_)?head_dim|d_kv|dim_head|attention_head_(dim|size)|kv_channels|swa_head_dim",
        HEAD_DIM,
    ),
    (r"rotary_dim", 8),
    (r"num_nextn_predict_layers|num_kv_shared_layers|num_mem_blocks", None),
    (r"(num_)?(hidden_layers|layers|block|blocks)|n_layers?|.*num_hidden_layers", LAYERS),
    (
        r"(encoder|decoder|num_encoder|num_decoder|speech_encoder|t2u_encoder|t2u_decoder)_layers",
        LAYERS,
    ),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|feed_?forward_size)", FFN),
    (r"d_ff|n_inner|d_inner|dff|dim_ff|dim_feedforward|encoder_ffn_embed_dim|block_ff_dim", FFN),
    (r"hidden_size|d_model|n_embd|model_dim|dim|emb_dim|word_embed_proj_dim|lru_width", HIDDEN),
    (r"embed_dim|embedding_size|embedding_dim|hidden_dim|input_embedding_size", HIDDEN),
    (r".*(projection_dim|projection_size|pooler_hidden_size|output_hidden_size)", HIDDEN),
    (r"classifier_proj_size|output_embedding_size|cross_attention_hidden_size", HIDDEN),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_source_positions", 128),
    (r"max_target_positions|context_length|max_sequence_length", 128),
    (r"image_size|crop_size", 32),
    (r"patch_size", 8),
    (r"(attention_)?sliding_window(_size)?|attention_window_size|local_attention|window_size", 4),
    (r"num_mel_bins|feature_projection_input_dim", 16),
    (r"(max_)?time_bins|num_frames", 8),
    (r"num_conv_pos_embeddings|conv_depthwise_kernel_size", 15),
    (r"num_conv_pos_embedding_groups", 4),
    (r"xvector_output_dim", HIDDEN),
    (r"use_mambapy|use_mamba_kernels", False),
)
_COMPILED = tuple((re.compile(pattern), value) for pattern, value in RULES)

#: Lists of the same length with these elements, by field name.
LISTS: dict[str, int] = {
    "depths": 1,
    "depth": 1,
    "stage_num_blocks": 1,
    "stage_numb_of_layers": 1,
    "num_conv_layers": 1,
    "conv_dim": 32,
    "attention_window": 4,
}

SWIN = {"image_size": 64, "patch_size": 2}  # no stage smaller than a window

#: By model type, what the rules do not give.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "convnext": {"image_size": 64},
    "convnextv2": {"image_size": 64},
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 2]},
    "donut-swin": {"embed_dim": 16, "num_heads": [1, 2, 4, 8], **SWIN},
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "esm": {"vocab_size": VOCAB, "mask_token_id": 4, "pad_token_id": 0},
    "hiera": {"embed_dim": 16, "image_size": [64, 64]},
    "levit": {"image_size": 64, "patch_size": 16},
    "mobilevitv2": {"image_size": 64, "patch_size": 2},
    "mobilebert": {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "perceiver": {"d_latents": 64, "num_latents": 8, "num_self_attends_per_block": 1},
    "swin": {"embed_dim": 16, "num_heads": [1, 2, 4, 8], **SWIN},
    "swinv2": {"embed_dim": 16, "num_heads": [1, 2, 4, 8], **SWIN},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": FFN,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 8,
        "indexer_compress_ratio": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "num_buckets": 2,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}

#: Kinds of models and the classes that transformers maps model types to.
KINDS: dict[str, dict[str, Any]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": {
        **modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    },
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
}

_LARGEST = 30_000_000  # parameters


@dataclass(frozen=True)
class Family:
    """One model class of transformers with the configuration class that makes it."""

    kind: str
    model_type: str
    class_name: str


def families(kind: str) -> Iterator[Family]:
    """The families of one kind, one for each model class."""
    named = [
        Family(kind, model_type, names if isinstance(names, str) else names[0])
        for model_type, names in KINDS[kind].items()
    ]
    owners = {family.class_name: family for family in named}
    for family in reversed(named):
        if family.class_name.lower().startswith(re.sub("[-_.]", "", family.model_type)):
            owners[family.class_name] = family  # not one that borrows the class
    for family in named:
        if owners[family.class_name] is family and hasattr(transformers, family.class_name):
            yield family


def shrink(config_class: type[PretrainedConfig], **overrides: Any) -> PretrainedConfig:
    """A small configuration of `config_class`, by the rules above."""
    values = _small_values(config_class())
    values.update(overrides)
    # Strict configurations check fields against one another: give up the rules that they refuse.
    droppable = ["layer_types", "sliding_window", "num_key_value_heads", "head_dim"]
    while True:
        try:
            return config_class(**values)
        except Exception:
            name = next((n for n in droppable if n in values and n not in overrides), None)
            if name is None:
                raise
            del values[name]


def _small_values(default: PretrainedConfig) -> dict[str, Any]:
    current = {**default.to_dict(), **{k: v for k, v in vars(default).items() if k[0] != "_"}}
    values: dict[str, Any] = {}
    for name, value in current.items():
        if isinstance(value, PretrainedConfig):
            if type(value) is not PretrainedConfig:
                values[name] = shrink(type(value))
        elif isinstance(value, (list, tuple)):
            if name in LISTS and value and all(isinstance(item, int) for item in value):
                values[name] = type(value)([LISTS[name]] * len(value))
        elif value is None or (isinstance(value, int) and not isinstance(value, bool)):
            small = _by_rule(name)
            if small is not None and (value is not None or name == "pad_token_id"):
                values[name] = min(small, value) if _is_count(name) and value else small
        elif isinstance(value, bool) and _by_rule(name) is False:
            values[name] = False
    heads = next((current[n] for n in ("num_attention_heads", "n_head") if n in current), None)
    if current.get("num_key_value_heads") == heads and heads is not None:
        values["num_key_value_heads"] = HEADS
    if "qk_rope_head_dim" in values:  # latent attention: its heads have two parts
        values["head_dim"] = values["qk_rope_head_dim"]
    kinds = current.get("layer_types")
    if isinstance(kinds, (list, tuple)) and kinds and "num_hidden_layers" in values:
        # One layer of each kind that the family alternates between.
        distinct = list(dict.fromkeys(kinds))
        values["layer_types"] = (distinct * 2)[: max(LAYERS, len(distinct))]
        values["num_hidden_layers"] = len(values["layer_types"])
    return values


def _by_rule(name: str) -> Any:
    return next((value for pattern, value in _COMPILED if pattern.fullmatch(name)), None)


def _is_count(name: str) -> bool:
    return "experts" in name or "layers" in name


def build(family: Family, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model of `family`: random weights of unit gain, eval, fp32; `changes` go into its
    configuration.

    Raises:
        ValueError: its smallest configuration is still large.
        Whatever transformers raises for configurations that it refuses.
    """
    cls = getattr(transformers, family.class_name)
    # A class for the text part of a composite model takes that part's configuration.
    config_class = cls.config_class or CONFIG_MAPPING[family.model_type]
    own = OVERRIDES.get(config_class.model_type) or OVERRIDES.get(family.model_type, {})
    config = shrink(config_class, **{**own, **changes})
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{family.class_name}: {size / 1e6:.0f} M parameters after shrinking")
    torch.manual_seed(seed)
    model = cls(config).eval().float()
    model.requires_grad_(False)
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Unit gain for every weight matrix, small biases; everything else keeps its own initial
    values (decays and time constants are not weights)."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            if not bool(torch.isfinite(parameter).all()):
                nn.init.normal_(parameter, std=0.1)  # left uninitialised
            if isinstance(module, nn.Embedding):
                nn.init.normal_(parameter, std=0.5)
            elif name.startswith("weight") and parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif name.startswith("weight") and parameter.dim() > 2:
                # Convolutions come in long chains whose activations halve the variance.
                nn.init.normal_(parameter, std=1.6 * parameter[0].numel() ** -0.5)
            elif parameter.dim() == 3:
                nn.init.normal_(parameter, std=max(parameter.shape[1:]) ** -0.5)  # experts
            elif name == "bias":
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif float(parameter.abs().max()) <= 1e-3:
                nn.init.normal_(parameter, std=0.3)  # zeros, layer scales: would hide what follows


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
    if kind == "seq2seq":
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
