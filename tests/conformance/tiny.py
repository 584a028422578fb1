"""Tiny random models of (nearly) any transformers class, and inputs for them.

    default config --shrink--> small config --> random weights of unit gain, seeded, eval, fp32

The shrinking is by field name: widths, depths, heads, vocabularies, experts, image sizes, in
nested configurations too. `OVERRIDES` holds what no rule gives. Weights are drawn with unit gain
(std 1/√fan_in), not with the 0.02 of pretraining: activations stay near 1, so that a difference of
1e-5 in the output means something.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tiny_configs import COMPILED, HEADS, LAYERS, LISTS, MROPE_SECTION, OVERRIDES
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

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
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
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
    """A small configuration of `config_class`, by the rules above.

    An override of a part is a dict of that part's overrides; with a "model_type" in it, the part
    is of that type.
    """
    try:
        default = config_class()
    except Exception:  # its own defaults contradict each other
        default = PretrainedConfig()
    values = _small_values(default, overrides)
    values.update({name: _part(value) for name, value in overrides.items() if name not in values})
    for name, value in overrides.items():
        if not isinstance(values[name], PretrainedConfig):
            values[name] = value
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


def _part(value: Any) -> Any:
    """The small configuration of a part whose override names its type; other values as they are."""
    if not (isinstance(value, dict) and "model_type" in value):
        return value
    own = {name: item for name, item in value.items() if name != "model_type"}
    return shrink(CONFIG_MAPPING[value["model_type"]], **own)


def _small_values(default: PretrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    current = {**default.to_dict(), **{k: v for k, v in vars(default).items() if k[0] != "_"}}
    if type(default) is PretrainedConfig:
        return {}
    values: dict[str, Any] = {}
    for name, value in current.items():
        if isinstance(value, PretrainedConfig):
            own = overrides.get(name, {})
            if isinstance(own, PretrainedConfig) or "model_type" in own:
                values[name] = _part(own)
            elif type(value) is not PretrainedConfig:
                values[name] = shrink(type(value), **own)
        elif isinstance(value, (list, tuple)):
            if name in LISTS and value and all(isinstance(item, int) for item in value):
                values[name] = type(value)([LISTS[name]] * len(value))
        elif value is None or (isinstance(value, int) and not isinstance(value, bool)):
            small = _by_rule(name)
            if small is not None and (value is not None or name == "pad_token_id"):
                values[name] = min(small, value) if _is_count(name) and value else small
        elif isinstance(value, dict) and "mrope_section" in value:
            values[name] = {**value, "mrope_section": MROPE_SECTION}
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
    return next((value for pattern, value in COMPILED if pattern.fullmatch(name)), None)


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
    own = next(
        (
            OVERRIDES[name]
            for name in (family.class_name, config_class.model_type, family.model_type)
            if name in OVERRIDES
        ),
        {},
    )
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
