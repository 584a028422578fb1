"""Taking over the adapters of a `peft.PeftModel` that is in memory.

PEFT replaces each target module in its parent by a wrapper that holds it as `base_layer`. Here
the adapters' weights are read first, then each wrapper is replaced by the module that it wraps,
so that the base model is what it was before PEFT. The PeftModel keeps its configurations but has
no adapters while it is unwrapped: asked for one by `adapter_names` it raises, called without it
computes the base model, and saving it would write no weights. `restore()` puts the wrappers back.
PEFT stays optional: nothing of it is imported before there is a PeftModel, which somebody made.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorafx.adapter_store.checkpoint import AdapterState
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.errors import CheckpointError, UnsupportedAdapterError


def is_peft_model(model: object) -> bool:
    """Whether `model` is a `peft.PeftModel`."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


@dataclass
class TakenOver:
    """An unwrapped PeftModel.

    Attributes:
        base: the base model, with PEFT's wrappers taken out.
        adapters: adapter name -> configuration, tensors (not copied) and live scales; each can
            be passed to `read_adapter`.
        active: the adapter that the PeftModel applied by default; None where that was none, or
            several at once.
    """

    base: nn.Module
    adapters: dict[str, AdapterState]
    active: str | None
    _wrappers: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    _peft_config: Any = None

    def restore(self) -> None:
        """Put PEFT's wrappers back, so that the PeftModel has its adapters again."""
        for parent, name, wrapper in reversed(self._wrappers):
            parent._modules[name] = wrapper
        self._wrappers.clear()
        if self._peft_config is not None:
            self.base.peft_config = self._peft_config
            self._peft_config = None


def from_peft_model(peft_model: nn.Module) -> tuple[nn.Module, dict[str, AdapterState]]:
    """(base model, adapters by name) of a PeftModel, unwrapped as `take_over` does."""
    taken = take_over(peft_model)
    return taken.base, taken.adapters


def take_over(peft_model: nn.Module) -> TakenOver:
    """Read the adapters of a PeftModel, then unwrap its base model.

    Raises, with the model unchanged: UnsupportedAdapterError when an adapter, or a wrapper in the
    model, is of a kind that lorafx does not do; CheckpointError when adapters are merged into the
    base weights.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(peft_model, peft.PeftModel):
        raise CheckpointError(f"{type(peft_model).__name__} is not a peft.PeftModel")
    configs = _configs(peft_model.peft_config)
    base = peft_model.get_base_model()
    layers = _lora_layers(base)
    merged = sorted({name for _, layer in layers for name in layer.merged_adapters})
    if merged:
        raise CheckpointError(
            f"adapters {', '.join(merged)} are merged into the base weights; call "
            "peft_model.unmerge_adapter() first"
        )
    # Not state_dict(): modules of bitsandbytes change their weights in it.
    tensors = {
        **dict(peft_model.named_parameters(remove_duplicate=False)),
        **dict(peft_model.named_buffers(remove_duplicate=False)),
    }
    adapters = {
        name: AdapterState(
            config,
            {
                key: tensor.detach()
                for key, tensor in peft.get_peft_model_state_dict(
                    peft_model, tensors, adapter_name=name, save_embedding_layers=False
                ).items()
            },
            f"the PeftModel's adapter {name!r}",
            {path: layer.scaling[name] for path, layer in layers if name in layer.scaling},
        )
        for name, config in configs.items()
    }
    taken = TakenOver(base, adapters, _active(peft_model, layers))
    _unwrap(taken)
    return taken


def _configs(peft_configs: dict[str, Any]) -> dict[str, PeftConfig]:
    configs, refused = {}, []
    for name, config in peft_configs.items():
        try:
            configs[name] = PeftConfig.read(config, where=f"the PeftModel's adapter {name!r}")
        except UnsupportedAdapterError as exc:
            refused.append(str(exc))
    if refused:
        raise UnsupportedAdapterError("\n".join(refused))
    return configs


def _lora_layers(base: nn.Module) -> list[tuple[str, Any]]:
    """(module path, wrapper) of PEFT's wrappers, all of them LoRA on a single module."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(path, m) for path, m in base.named_modules() if isinstance(m, BaseTunerLayer)]
    for path, layer in layers:
        inner = getattr(layer, "base_layer", None)
        # Two parameters of one module have a wrapper each, one inside of the other.
        nested = isinstance(layer, ParamWrapper) and isinstance(inner, ParamWrapper)
        single = inner is not None and not isinstance(inner, BaseTunerLayer)
        if not isinstance(layer, LoraLayer) or not (nested or single):
            raise UnsupportedAdapterError(
                f"{path} is wrapped by {type(layer).__name__}, which lorafx cannot unwrap; load "
                "the adapters from their folders onto the plain model"
            )
    return layers


def _active(peft_model: Any, layers: list[tuple[str, Any]]) -> str | None:
    names = peft_model.active_adapters
    enabled = all(not layer.disable_adapters for _, layer in layers)
    return names[0] if enabled and len(names) == 1 else None


def _unwrap(taken: TakenOver) -> None:
    from peft.tuners.lora import LoraLayer

    # The tuner hangs its configurations on the base, which would then look adapted to others.
    taken._peft_config = vars(taken.base).pop("peft_config", None)
    parents = [m for m in taken.base.modules() if not isinstance(m, LoraLayer)]
    for parent in parents:
        for name, child in list(parent._modules.items()):
            if isinstance(child, LoraLayer):
                inner = child.base_layer
                while isinstance(inner, LoraLayer):
                    inner = inner.base_layer
                parent._modules[name] = inner
                taken._wrappers.append((parent, name, child))
