"""An adapter written as PEFT saves it: adapter_config.json beside adapter_model.safetensors.

s_m = α_m / r_m        r and α of most modules; rank_pattern, alpha_pattern for the others
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lorafx.adapter_store.peft_config import CONFIG_FILE
from lorafx.adapter_store.peft_keys import factor_sizes, parse, without_prefix
from lorafx.adapter_store.saved import SAFETENSORS, AdapterState
from lorafx.errors import CheckpointError, ConfigError
from lorafx.model.saved_names import PREFIX

_ENDINGS = {"m": "lora_magnitude_vector", "b": "lora_B.bias"}


def write_peft(state: AdapterState, folder: Path) -> tuple[str, ...]:
    """Write `state` into the new `folder`; returns module paths. Raises ConfigError for a full
    folder or PEFT's own state, CheckpointError for keys without factors or paths without dots."""
    if state.dialect == "peft":
        raise ConfigError(f"{state.where} is a PEFT adapter already; copy its folder")
    refuse_full(folder)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    sizes, bias = factor_sizes(state.tensors), False
    for key, tensor in state.tensors.items():
        factor = parse(key)
        if factor is None:
            raise CheckpointError(
                f"{state.where} has keys that are no factors of LoRA, such as {key[:200]!r}; PEFT "
                "has no names for them"
            )
        path, bias = without_prefix(factor.module), bias or factor.letter == "b"
        form = "lora_embedding_{}" if factor.embedding else "lora_{}.weight"
        ending = _ENDINGS.get(factor.letter) or form.format(factor.letter)
        tensors[f"{PREFIX}{path}.{ending}"] = tensor.contiguous()
        if factor.letter == "A":
            ranks[path] = sizes[factor.module].rank
    if ranks and not any("." in path for path in ranks):
        raise CheckpointError(
            f"{state.where} has names without dots, such as {next(iter(ranks))!r}; give the model, "
            "whose modules they mean: --model FOLDER"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / SAFETENSORS, {"format": "pt"})
        fields = json.dumps(_fields(state, ranks, bias), indent=2)
        (folder / CONFIG_FILE).write_text(fields + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    return tuple(ranks)


def refuse_full(folder: Path) -> None:
    """Raise ConfigError where `folder` is a file or not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty; name a folder that does not exist yet")


def _fields(state: AdapterState, ranks: dict[str, int], bias: bool) -> dict[str, Any]:
    alphas = {}
    for path, rank in ranks.items():
        known = state.scales.get(path)
        alpha = float(rank * (state.config.scale(path, rank) if known is None else known))
        alphas[path] = int(alpha) if alpha.is_integer() else alpha
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    # PEFT's patterns are regular expressions that may begin at any dot.
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": state.config.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "rank_pattern": {f"^{re.escape(p)}": r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(p)}": a for p, a in alphas.items() if a != alpha},
        "bias": "none",
        "lora_bias": bias,
        "use_dora": state.config.use_dora,
        "use_rslora": False,
        "fan_in_fan_out": state.config.fan_in_fan_out,
        "init_lora_weights": True,
    }
