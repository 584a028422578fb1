"""What the names of a checkpoint lead to in a model.

    model.layers.0.self_attn.q_proj.weight                the name in `state_dict()`, or any alias
    base_model.model.model.layers.0….q_proj.base_layer.weight    a wrapped model's
    _orig_mod.model.…, module.model.…                     wrappers of torch.compile, DDP, FSDP

Wrappers' names are left out wherever a module has no child of that name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from lorafx.adapter_store.peft_keys import COMPILED, PREFIX
from lorafx.base_weights.weight_places import Target
from lorafx.errors import LorafxError
from lorafx.model.module_graph import ModuleGraph, join

#: Names that wrappers put between a module and what they wrap.
WRAPPERS = frozenset(
    {
        COMPILED,
        "module",  # DistributedDataParallel
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "base_layer",  # PEFT's tuner layers
        "original_module",  # PEFT's modules_to_save
    }
)


class Walked(NamedTuple):
    """How far a name leads: a module, its path as it was walked, and the names left over."""

    module: nn.Module
    path: str
    rest: tuple[str, ...]


class Names:
    """Walks names of tensors through one model."""

    def __init__(self, graph: ModuleGraph, model: nn.Module) -> None:
        self.graph = graph
        self._model = model
        self._targets: dict[tuple[int, str], Target] = {}
        #: What `state_dict()` may have: parameters and persistent buffers, each by its first name.
        self.required: list[Target] = []
        self.optional: list[Target] = []
        for path, module in model.named_modules():
            for kind, found in (
                (module._parameters, self.required),
                (module._buffers, self.optional),
            ):
                for name, tensor in kind.items():
                    if tensor is not None:
                        target = Target(module, name, join(path, name))
                        self._targets[id(module), name] = target
                        found.append(target)
        self._has_prefix = PREFIX.partition(".")[0] in model._modules
        prefix = getattr(model, "base_model_prefix", "")
        self._inner = prefix if isinstance(prefix, str) else ""

    def target(self, module: nn.Module, attribute: str) -> Target | None:
        """The tensor that `module` holds by this name, None where it holds none."""
        return self._targets.get((id(module), attribute))

    def ways(self, target: Target) -> int:
        """How many paths lead to a target's module; 2 where there are more."""
        try:
            return len(self.graph.paths(target.module, limit=2))
        except LorafxError:  # put there since the model was compiled
            return 1

    def readings(self, name: str) -> Iterator[str]:
        """What `name` may be without prefixes, likeliest first."""
        # Nobody but PEFT begins so, unless the model has such a child itself.
        prefixed = name.startswith(PREFIX) and not self._has_prefix
        found = dict.fromkeys([] if prefixed else [name])
        plain = without_wrappers(name)
        for reading in (name, plain):
            while reading.startswith(PREFIX):
                reading = reading.removeprefix(PREFIX)
                found[reading] = None
        found[plain] = None
        if self._inner:  # the model of a task head is saved without it, and the other way round
            for reading in list(found):
                inner = reading.removeprefix(f"{self._inner}.")
                found[join(self._inner, reading) if inner == reading else inner] = None
        return iter(found)

    def walk(self, name: str) -> Walked:
        """Follow the dots of `name` through modules as far as they lead."""
        module, path = self._model, ""
        rest = name.split(".")
        while rest:
            child = module._modules.get(rest[0])
            if child is not None:
                module, path = child, join(path, rest.pop(0))
                continue
            wrapped = module._modules.get(COMPILED)
            if wrapped is not None:
                module, path = wrapped, join(path, COMPILED)
            elif rest[0] in WRAPPERS and len(rest) > 1:
                rest.pop(0)
            else:
                break
        return Walked(module, path, tuple(rest))


def without_wrappers(name: str) -> str:
    """`name` without the names of wrappers, the last component excepted."""
    *modules, last = name.split(".")
    return ".".join([*(part for part in modules if part not in WRAPPERS), last])
