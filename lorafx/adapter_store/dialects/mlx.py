"""mlx-lm's adapters: adapters.safetensors beside a specific adapter_config.json.

    <module>.lora_a (K, r), .lora_b (r, N)    y + scale · (x lora_a) lora_b
    <module>.m (N,)                           DoRA, beside either
    <mlp>.switch_mlp.<proj>.lora_a (E, r, K), .lora_b (E, N, r)    routed experts

`scale`, in `lora_parameters`, is not divided by r. Older releases: s = scale · alpha / rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorafx.adapter_store.config_values import number, short
from lorafx.adapter_store.dialects.dialect import Translation, raw
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError, UnsupportedAdapterError

KEYS = "<module>.lora_a"
_FACTOR = re.compile(r"(?:(?P<module>.+)\.)?(?P<factor>lora_[ab]|m)")
_SWITCH = "switch_mlp"


def configures(fields: Mapping[str, Any]) -> bool:
    return "peft_type" not in fields and "lora_parameters" in fields


def claims(saved: Saved) -> bool:
    return any(key.endswith((".lora_a", ".lora_b")) for key in saved.tensors)


def state(saved: Saved, model: nn.Module | None) -> AdapterState:
    fields = raw(saved.fields)
    scale = _scale(fields, saved.where)
    kind = fields.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedAdapterError(
            f"{saved.where} has fine_tune_type = {short(kind)}, which trains whole weights; "
            "fuse it into the base model (mlx_lm.fuse) and load that"
        )
    found = Translation(saved, "mlx", model)
    paths: dict[str, None] = {}
    for key, tensor in saved.tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None or (match["factor"] == "m" and kind != "dora"):
            found.keep(key)
            continue
        path, letter = match["module"] or "", match["factor"].removeprefix("lora_")
        parts = path.split(".")
        if _SWITCH in parts:
            paths.update(dict.fromkeys(_experts(found, parts, letter, tensor, key)))
            continue
        if letter != "m" and tensor.dim() != 2:
            raise CheckpointError(
                f"{saved.where}: {key} has shape {tuple(tensor.shape)}, not (K, r) or (r, N)"
            )
        if letter == "m":
            found.add(path, letter, tensor)
        else:
            found.add(path, letter.upper(), tensor.mT)
        paths[path] = None
    found.scales.update(dict.fromkeys(paths, scale))
    return found.state(PeftConfig(use_dora=kind == "dora"))


def _experts(
    found: Translation, parts: list[str], letter: str, tensor: Tensor, key: str
) -> list[str]:
    at = parts.index(_SWITCH)
    before, after = parts[:at], parts[at + 1 :]
    if letter == "a" and tensor.dim() == 2:  # (E·r, K) in older releases; E is that of B
        b = found.saved.tensors.get(key.removesuffix("a") + "b")
        experts = b.shape[0] if b is not None and b.dim() == 3 else 0
        if experts and tensor.shape[0] % experts == 0:
            tensor = tensor.unflatten(0, (experts, -1))
    if tensor.dim() != 3 or letter == "m" or len(after) != 1:
        raise CheckpointError(
            f"{found.saved.where}: {key} has shape {tuple(tensor.shape)}; factors of routed "
            "experts are (E, r, K) and (E, N, r)"
        )
    paths = [".".join([*before, "experts", str(e), *after]) for e in range(len(tensor))]
    for path, factor in zip(paths, tensor, strict=True):
        found.put(f"{path}.lora_{letter.upper()}.weight", factor)
    return paths


def _scale(fields: Any, where: str) -> float:
    given = fields.get("lora_parameters")
    if not isinstance(given, dict):
        raise CheckpointError(
            f"{where} is in mlx-lm's dialect and has no lora_parameters with its scale; give the "
            "folder with adapter_config.json, or config={'lora_parameters': {'rank': ..., "
            "'scale': ...}}"
        )
    scale, alpha, rank = values = [given.get(name) for name in ("scale", "alpha", "rank")]
    finite = all(value is None or (number(value) and abs(value) < 1e30) for value in values)
    if finite and scale is not None and (alpha is None or rank):
        found = float(scale) if alpha is None else float(scale) * alpha / rank
        if math.isfinite(found):
            return found
    raise CheckpointError(f"{where}: lora_parameters has no finite scale: {short(given)}")
