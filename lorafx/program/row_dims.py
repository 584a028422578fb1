"""The requests' and tokens' dimensions of arguments with known names, from transformers' forwards.
`LoraConfig.row_dims` declares others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

#: By convention, without other knowledge.
BATCH_FIRST = 0

#: Arguments in order of precedence for the number of requests.
PRIMARY = (
    *("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features"),
    *("decoder_input_ids", "decoder_inputs_embeds"),
)
_MASKS_AND_TYPES = (
    *("attention_mask", "decoder_attention_mask", "encoder_attention_mask"),
    *("cross_attention_mask", "global_attention_mask", "padding_mask", "input_mask", "pixel_mask"),
    *("pixel_attention_mask", "spatial_shapes", "bool_masked_pos", "mask_time_indices"),
    *("perm_mask", "target_mapping", "token_type_ids", "mm_token_type_ids", "query_embeds"),
    *("qformer_input_ids", "qformer_attention_mask", "flattened_patches", "segment_ids", "langs"),
    *("lengths", "bbox", "labels"),
)
_STATES = (
    *("encoder_hidden_states", "encoder_outputs", "past_key_values", "cache_params"),
    *("past_buckets_states", "state"),
)
_SHARED = (
    *("cache_position", "head_mask", "decoder_head_mask", "cross_attn_head_mask"),
    *("logits_to_keep", "num_logits_to_keep"),
)
#: Argument role -> dimension of the requests; None for shared arguments.
ROW_DIMS: Mapping[str, int | None] = {
    **dict.fromkeys((*PRIMARY, *_MASKS_AND_TYPES, *_STATES), BATCH_FIRST),
    "mems": 1,  # (memory length, batch, hidden)
    **dict.fromkeys(_SHARED),
}

#: Only in models that declare roles: elsewhere such names are ambiguous, and the sequence may come
#: first.
DECLARED_DIMS: Mapping[str, int | None] = dict.fromkeys(
    (
        # images beside a text
        *("visual_embeds", "visual_attention_mask", "visual_token_type_ids"),
        *("visual_feats", "visual_pos"),
        # time series
        *("past_values", "past_time_features", "past_observed_mask", "observed_mask"),
        *("future_values", "future_time_features", "future_observed_mask"),
        *("static_categorical_features", "static_real_features"),
        # trajectories
        *("states", "actions", "rewards", "returns_to_go", "timesteps"),
    ),
    BATCH_FIRST,
)

#: For a packed call over a paged cache: (1, T) tokens of all sequences in turn. Each token counts
#: as a request here, with the slot of its request.
PACKED_DIMS: Mapping[str, int | None] = {
    "input_ids": 1,
    "inputs_embeds": 1,
    "position_ids": 1,
    "token_type_ids": 1,
    "attention_mask": 2,  # (1, 1, T, keys)
    "cache": None,
    "logits_to_keep": None,
}

#: Arguments of a packed call whose values are token positions.
PICKS = ("logits_to_keep",)

#: Arguments whose channels and image size are graph constants: as symbols, tracing does not finish
#: with the expressions of window partitions and rolls (Swin).
IMAGES = ("pixel_values",)

#: Arguments with an entry for each token -> that dimension; in a call all have length T.
TOKEN_DIMS: Mapping[str, int] = dict.fromkeys(
    ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"), 1
)

#: Arguments that keep earlier tokens.
CACHES = ("past_key_values", "cache_params", "past_buckets_states", "state", "mems")


def caches(named: Mapping[str, Any]) -> list[Any]:
    return [named[name] for name in CACHES if named.get(name) is not None]


def new_tokens(named: Mapping[str, Any]) -> dict[str, int]:
    """A call's arguments with an entry for each of its T tokens -> that dimension."""
    cached = bool(caches(named))
    return {
        name: dim
        for name, dim in TOKEN_DIMS.items()
        if isinstance(value := named.get(name), Tensor)
        and value.dim() > dim
        and (name != "attention_mask" or (value.dim() == 2 and not cached))
    }


#: Arguments with an entry for each token -> their rank if a request is one sequence.
_RANKS: Mapping[str, int] = {**dict.fromkeys(TOKEN_DIMS, 2), "inputs_embeds": 3}


def choices(named: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    """A call's arguments (B, C, T) with a request's sequences in dimension 1 (multiple choice)."""
    given = {own: named.get(prefix + own) for own in _RANKS}
    several = {
        own: value
        for own, value in given.items()
        if isinstance(value, Tensor) and value.dim() == _RANKS[own] + 1
    }
    main = next((several[own] for own in PRIMARY if own in several), None)
    if main is None:
        return ()
    return tuple(
        prefix + own for own, value in several.items() if value.shape[:3] == main.shape[:3]
    )


def _position_ids_dim(tensor: Tensor, several: bool) -> int | None:
    """(T,) is shared; requests come first in (B, T), (B, C, T), second in (axes, B, T)."""
    return 0 if several else {0: None, 1: None, 2: 0}.get(tensor.dim(), 1)


#: Roles whose dimension depends on the tensor's rank, and on whether requests have several
#: sequences.
RANKED: Mapping[str, Callable[[Tensor, bool], int | None]] = {
    "position_ids": _position_ids_dim,
    "decoder_position_ids": _position_ids_dim,
}
