"""What makes configurations small: rules by field name, and what no rule gives, by model type.

Values for a part of a composite configuration stand in a dict under that part's name.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB, EXPERTS = 64, 96, 4, 2, 16, 2, 128, 4

IMAGE_TOKEN = 110  # ids of texts are smaller

#: (pattern of the field's name, value). The first that matches wins; None leaves the default.
RULES: tuple[tuple[str, Any], ...] = (
    (r"(bos|decoder_start|forced_bos)_token_id", 1),
    (r"(eos|sep|cls|forced_eos)_token_id", 2),
    (r"pad_token_id", 0),
    (r"mask_token_id", 4),
    # what stands for another modality lies above the ids that texts are made of
    (r"image_token_(id|index)", IMAGE_TOKEN),
    (r"video_token_(id|index)", IMAGE_TOKEN + 1),
    (r"audio_token_(id|index)", IMAGE_TOKEN + 2),
    (r"(vision|image)_start_token_id|boi_token_id", IMAGE_TOKEN + 3),
    (r"(vision|image)_end_token_id|eoi_token_id", IMAGE_TOKEN + 4),
    (r"vision_token_id", IMAGE_TOKEN + 5),
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
    (r"(moe|shared_experts?|shared|expert_ffn|expert).*(intermediate|hidden)_size", 32),
    (r".*num_key_value_heads|n_kv_heads|multi_query_heads|num_kv_heads", KV_HEADS),
    (r".*(attention_heads|num_heads)|n_heads?", HEADS),
    (r"(global_|swa_)?head_dim|d_kv|dim_head|attention_head_(dim|size)|kv_channels", HEAD_DIM),
    (r"rotary_dim", 8),
    (r"num_nextn_predict_layers|num_kv_shared_layers|num_mem_blocks", None),
    (r"(num_)?(hidden_layers|layers|block|blocks)|n_layers?|.*num_hidden_layers", LAYERS),
    (r"(num_|speech_|t2u_)?(encoder|decoder)_layers", LAYERS),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|feed_?forward_size)", FFN),
    (r"d_ff|n_inner|d_inner|dff|dim_ff|dim_feedforward|encoder_ffn_embed_dim|block_ff_dim", FFN),
    (r"hidden_size|d_model|n_embd|model_dim|dim|emb_dim|word_embed_proj_dim|lru_width", HIDDEN),
    (r"embed_dim|embedding_size|embedding_dim|hidden_dim|input_embedding_size", HIDDEN),
    (r"(out|(input_)?text|llm|vision_language)_hidden_size|vision_output_dim", HIDDEN),
    (r"mm_tokens_per_image|num_query_tokens", 4),
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
COMPILED = tuple((re.compile(pattern), value) for pattern, value in RULES)

#: Lists of the same length with these elements, by field name.
LISTS: dict[str, int] = {
    "depths": 1,
    "depth": 1,
    "stage_num_blocks": 1,
    "stage_numb_of_layers": 1,
    "num_conv_layers": 1,
    "conv_dim": 32,
    "attention_window": 4,
    "block_sizes": 1,
}

#: Sections of a head's dimensions that rotate by time, height and width.
MROPE_SECTION = [2, 3, 3]

SWIN = {"image_size": 64, "patch_size": 2}  # no stage smaller than a window

VIBEVOICE = {"num_filters": 4, "depths": [1] * 7, "downsampling_ratios": [2, 2, 4, 5, 5, 8]}


FULL_ROPE = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
INDEXER = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM},
    **{"indexer_budget": 8, "indexer_compress_ratio": 1},
}
REFORMER = {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 2}
ZAMBA = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}


def mrope(sections: list[int]) -> dict[str, Any]:
    """The overrides of a text part whose rotary embedding has `sections`."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    return {"text_config": {"rope_parameters": rope}}


#: By class or model type, what the rules do not give.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "convnext": {"image_size": 64},
    "convnextv2": {"image_size": 64},
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
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
    "cohere_compass_text": FULL_ROPE,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        **{"num_hidden_layers": 3, "layer_types": [*["sliding_attention"] * 2, "full_attention"]},
        **{"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    },
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
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, **REFORMER},
    # Parts, and families whose defaults are not enough.
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "patch_in_forward": False,
        "use_cache": False,
        "encoder_config": {"hidden_size_global": HIDDEN},
        "decoder_config": {"hidden_size_global": HIDDEN},
    },
    "dbrx": {
        **{"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 128},
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": KV_HEADS, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "dia": {
        "decoder_config": {
            **{"cross_hidden_size": HIDDEN, "cross_head_dim": HEAD_DIM},
            **{"cross_num_attention_heads": HEADS, "cross_num_key_value_heads": HEADS},
        }
    },
    "dots3_note_text": {
        "per_layer_config": {
            1: {
                **{"num_attention_heads": HEADS, "num_key_value_heads": HEADS},
                **{"kv_lora_rank": HEAD_DIM, "qk_nope_head_dim": 8},
            }
        }
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": HIDDEN // 4}},
    "kyutai_speech_to_text": {
        "audio_pad_token_id": 3,
        "audio_bos_token_id": 5,
        **{"num_codebooks": 4, "codebook_vocab_size": VOCAB},
        "codec_config": {"upsample_groups": HIDDEN},
    },
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "nemo_speechlm": {
        "audio_config": {
            "asr_config": {"blank_token_id": 5},
            "diarization_config": {"head_config": {"audio_hidden_size": HIDDEN}},
        }
    },
    "ReformerForMaskedLM": REFORMER,
    "shieldgemma2": {"yes_token_index": 10, "no_token_index": 11},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": VIBEVOICE,
        "semantic_tokenizer_encoder_config": VIBEVOICE,
    },
    "vibevoice": {"audio_config": VIBEVOICE, "semantic_model_config": VIBEVOICE},
    **{key: {"image_token_index": IMAGE_TOKEN} for key in ("blip-2", "instructblip")},
    "chameleon": {"vocabulary_map": {"<image>": IMAGE_TOKEN}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        "canvas_length": 8,
    },
    "emu3": {
        "vocabulary_map": {"<image>": IMAGE_TOKEN},
        "vq_config": {"base_channels": 32, "codebook_size": 64, "channel_multiplier": [1, 1]},
    },
    "florence2": {"vision_config": {"embed_dim": [32, 64, 64, 64], "projection_dim": HIDDEN}},
    "glm5_next": {"text_config": {"num_key_value_heads": HEADS, "index_kpool": 4}},
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "2/4",
    },
    "hunyuan_vl": {"text_config": {**mrope(MROPE_SECTION)["text_config"], "head_dim": HEAD_DIM}},
    "apertus1p5": {
        "text_config": {"vocab_size": 2 * VOCAB},
        "vision_config": {"codebook_size": 64, "embed_dim": 32, "base_channels": 32},
        "audio_config": {"codebook_size": 16, "codebook_dim": HIDDEN},
        **{"image_token_offset": 144, "audio_token_offset": 208},
        **{"image_token_id": IMAGE_TOKEN, "audio_token_id": IMAGE_TOKEN + 2},
    },
    "instructblipvideo": {"video_token_index": IMAGE_TOKEN},
    "janus": {"vq_config": {"base_channels": 32, "latent_channels": 32, "num_embeddings": 64}},
    "mistral4": {
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 128,
        }
    },
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "out_hidden_size": HIDDEN}},
    "qwen4_exp": {"text_config": INDEXER},
    "cohere_compass": {"text_config": FULL_ROPE},
    "dots3_note": {
        "vision_config": {
            **{"per_layer_config": None, "adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN}
        },
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "ernie4_5_vl_moe": mrope([2, 2, 4]),
    "inkling2": {"vision_config": {"text_hidden_size": HIDDEN}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    **dict.fromkeys(("glm46v", "glm4v", "glm_ocr"), mrope(MROPE_SECTION)),
    **dict.fromkeys(("paddleocr_vl", "qwen2_5_vl", "qwen2_vl"), mrope(MROPE_SECTION)),
    **dict.fromkeys(("glm4v_moe", "hy_v4_vl"), mrope([1, 1, 2])),
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": IMAGE_TOKEN + 3,
        **mrope(MROPE_SECTION),
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": IMAGE_TOKEN + 3},
    "step3p7": {"text_config": {"sliding_window": 4}},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    **dict.fromkeys(("zamba", "zamba2"), ZAMBA),
}
