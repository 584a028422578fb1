"""mlx-lm's adapters: adapters.safetensors beside a specific adapter_config.json.

    <module>.lora_a (K, r), .lora_b (r, N)    y + scale · (x lora_a) lora_b
    <module>.m (N,)                           DoRA, beside either
    <mlp>.switch_mlp.<proj>.lora_a (E, r, K), .lora_b (E, N, r)    routed experts

`scale`, in `lora_parameters`, is not divided by r.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lorafx.adapter_store.dialects.files import assembled
from lorafx.adapter_store.dialects.module_paths import ModulePaths
from lorafx.adapter_store.dialects.spelling import NamedTensor
from lorafx.adapter_store.field_checks import is_number, short
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError, UnsupportedAdapterError

_FACTOR = re.compile(r"(?:(?P<module>.+)\.)?(?P<factor>lora_[ab]|m)")


def configures(fields: Mapping[str, Any]) -> bool:
    return "peft_type" not in fields and "lora_parameters" in fields


def claims(saved: Saved) -> bool:
    return any(key.endswith((".lora_a", ".lora_b")) for key in saved.tensors)


def state(saved: Saved, model: nn.Module | None) -> AdapterState:
    fields: Any = {} if isinstance(saved.fields, PeftConfig) else saved.fields or {}
    scale = _scale(fields, saved.where)
    kind = fields.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedAdapterError(
            f"{saved.where} has fine_tune_type = {short(kind)}, which trains whole weights; "
            "fuse it into the base model (mlx_lm.fuse) and load that"
        )
    parts = [part for item in saved.tensors.items() for part in _parts(saved, *item, kind)]
    if kind == "dora" and not any(part.letter == "m" for part in parts):
        raise CheckpointError(f"{saved.where} has fine_tune_type = 'dora', and no magnitudes m")
    scales = {part.place: scale for part in parts}
    names = None if model is None else ModulePaths(model)
    return assembled(replace(saved, fields=None), "mlx", parts, scales, names)


def _parts(saved: Saved, key: str, tensor: Tensor, kind: str) -> Iterator[NamedTensor]:
    match = _FACTOR.fullmatch(key)
    if match is None or (match["factor"] == "m" and kind != "dora"):
        yield NamedTensor(key, tensor, "", key, "")
        return
    path, letter = match["module"] or "", match["factor"][-1]
    before, of_experts, projection = path.partition(".switch_mlp.")
    if letter == "m" and not of_experts:
        yield NamedTensor(key, tensor, "", path, letter)
    elif letter == "m" or tensor.dim() != (3 if of_experts else 2):
        raise CheckpointError(
            f"{saved.where}: {key} has shape {tuple(tensor.shape)}; factors are (K, r) and "
            "(r, N), of routed experts (E, r, K) and (E, N, r)"
        )
    elif not of_experts:
        yield NamedTensor(key, tensor.mT, "", path, letter.upper())
    else:
        for expert, factor in enumerate(tensor):
            module = f"{before}.experts.{expert}.{projection}"
            yield NamedTensor(key, factor, "", module, letter.upper())


def _scale(fields: Any, where: str) -> float:
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise CheckpointError(
            f"{where} is in mlx-lm's dialect and has no lora_parameters with its scale; give the "
            "folder with adapter_config.json, or config={'lora_parameters': {'rank': ..., "
            "'scale': ...}}"
        )
    scale: Any = parameters.get("scale")
    if "alpha" not in parameters and is_number(scale) and abs(scale) < 1e30:
        return float(scale)
    raise CheckpointError(
        f"{where}: lora_parameters has no finite scale: {short(parameters)}; give config="
        "{'lora_parameters': {'scale': ...}}, where older releases say alpha with scale · alpha / "
        "rank"
    )
