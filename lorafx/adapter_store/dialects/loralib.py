"""loralib's bare parameters, as `lora_state_dict` saves them.

    <module>.lora_A (r, K), .lora_B (N, r)            s = lora_alpha / r;  embeddings (r, V), (D, r)
    <module>.lora_A (G·r, K), .lora_B (N·G/P, r)      MergedLinear: G of P equal slices have LoRA

In MergedLinear rows g·r … of A belong to slice g: a block-diagonal B of rank G·r, s unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.adapter_store.config_values import number, short
from lorafx.adapter_store.dialects.dialect import Translation, raw
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError

KEYS = "<module>.lora_A"
_FACTOR = re.compile(r"(?:(?P<module>.+)\.)?lora_(?P<letter>[AB])")


def claims(saved: Saved) -> bool:
    return any(_FACTOR.fullmatch(key) for key in saved.tensors)


def state(saved: Saved, model: nn.Module | None) -> AdapterState:
    fields = raw(saved.fields)
    alpha = _alpha(saved)
    found, pairs = Translation(saved, "loralib", model), dict[str, dict[str, Tensor]]()
    for key, tensor in saved.tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            found.keep(key)
        else:
            pairs.setdefault(match["module"] or "", {})[match["letter"]] = tensor
    for path, pair in pairs.items():
        a, b = pair.get("A"), pair.get("B")
        rank = b.shape[1] if b is not None and b.dim() == 2 else 0  # r of one slice
        rows = a.shape[0] if a is not None and a.dim() == 2 else 0
        if rows > rank > 0 and rows % rank == 0:
            pair = _ungrouped(found, path, pair, rows // rank, fields)
        for letter, tensor in pair.items():
            found.add(path, letter, tensor)
        if rank:
            found.scales[path] = alpha / rank
    return found.state(PeftConfig())


def _alpha(saved: Saved) -> float:
    given = saved.fields.lora_alpha if isinstance(saved.fields, PeftConfig) else None
    alpha: Any = raw(saved.fields).get("lora_alpha") if given is None else given
    if number(alpha) and abs(alpha) < 1e30:
        return alpha
    raise CheckpointError(
        f"{saved.where} is in loralib's dialect, whose files do not say α; give "
        "AdapterSource(..., config={'lora_alpha': ...})"
        + ("" if alpha is None else f", a finite number, not {short(alpha)}")
    )


def _ungrouped(
    found: Translation,
    path: str,
    pair: Mapping[str, Tensor],
    groups: int,
    fields: Mapping[str, Any],
) -> dict[str, Tensor]:
    b, where = pair["B"], found.saved.where
    enabled = fields.get("enable_lora", [True] * groups)
    if not isinstance(enabled, list | tuple) or sum(map(bool, enabled)) != groups:
        raise CheckpointError(
            f"{where}: {path} has factors of {groups} slices, and enable_lora is {short(enabled)}"
        )
    weight = getattr(found.module(path), "weight", None)
    rows, given = len(b) // groups, groups * b.shape[1]
    total = rows * len(enabled)
    fits = not isinstance(weight, Tensor) or total in weight.shape
    if not rows or len(b) % groups or not fits:
        raise CheckpointError(
            f"{where}: {path} has factors of {groups} slices of {rows} rows, which are not those "
            f"of a weight {tuple(getattr(weight, 'shape', ()))}; a MergedLinear with slices "
            "without LoRA needs config={'lora_alpha': ..., 'enable_lora': [...]}"
        )
    most = 4 * sum(t.numel() for t in pair.values()) + (1 << 20)
    if total * given > max(most, weight.numel() if isinstance(weight, Tensor) else 0):
        raise CheckpointError(f"{where}: {path} would be far larger than its file")
    blocks = iter(b.split(rows))
    whole = torch.zeros(total, given, dtype=b.dtype)
    rank, at = given // groups, 0
    for index, on in enumerate(enabled):
        if on:
            whole[index * rows : (index + 1) * rows, at : at + rank] = next(blocks)
            at += rank
    return {"A": pair["A"], "B": whole}
