"""The modules and parameters of a model that a PEFT configuration picks."""

from __future__ import annotations

from torch import nn

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.model.module_graph import ModuleGraph, join
from lorafx.model.packed_names import PackedNames
from lorafx.model.targets import SavedTargets, is_all_linear, output_embedding
from lorafx.registry import lookup


def picked(config: PeftConfig, model: nn.Module) -> SavedTargets:
    """Paths of the modules, and of the 3-D parameters, that PEFT would put LoRA on.

    A targeted matrix is named by the module that holds it. Modules may be named by packed names.
    """
    every = is_all_linear(config.target_modules)
    head = output_embedding(model) if every else None
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        entry = lookup(module) if every else None
        linear = entry is not None and entry.is_linear and module is not head
        if linear or config.matches(path):
            found[path] = None
        for name, parameter in module.named_parameters(recurse=False):
            if config.targets_parameter(join(path, name)):
                found[path if parameter.dim() < 3 else join(path, name)] = None
    packed = PackedNames(ModuleGraph(model)).named()
    found.update((path, None) for path, _ in packed if config.matches(path))
    return SavedTargets(found)
