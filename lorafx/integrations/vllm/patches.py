"""What vLLM is given in place of its own code, for the versions of vLLM in plugin.py.

The table of docs/guides/vllm.md is made of `PATCHES`.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pkgutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from lorafx.errors import LorafxError, UnsupportedVersionError
from lorafx.integrations.vllm import sites
from lorafx.integrations.vllm.checking import check_reading
from lorafx.integrations.vllm.experts import experts_class
from lorafx.integrations.vllm.wrapper import LoraWrapper
from lorafx.kernels.cpu.compiler import best_isa
from lorafx.progress import LOG


class Patch(NamedTuple):
    """`make(replaced)` stands at `owner.name`, where `replaced` stood, for `purpose`. The owner is
    a class, a module, or an object whose class it is."""

    owner: str
    name: str
    make: Callable[[Any], Any]
    purpose: str

    def apply(self) -> None:
        """Puts it in its place, unless it stands there."""
        owner = pkgutil.resolve_name(self.owner)
        if not isinstance(owner, (type, ModuleType)):
            owner = type(owner)
        replaced = inspect.getattr_static(owner, self.name)
        if not getattr(replaced, "of_lorafx", False):
            made = self.make(replaced)
            made.of_lorafx = True
            setattr(owner, self.name, made)


def apply() -> None:
    if _has_kernels():
        for patch in PATCHES:
            patch.apply()


def refuse_lora(error: LorafxError) -> None:
    """Raises `error` when vLLM first asks for LoRA's kernels."""

    def refused(_: Any) -> Any:
        def get_punica_wrapper(_: Any) -> str:
            raise error

        return classmethod(get_punica_wrapper)

    if _has_kernels():
        PATCHES[0]._replace(make=refused).apply()


def _has_kernels() -> bool:
    """Whether lorafx has kernels for vLLM's device; elsewhere vLLM computes LoRA, which is said."""
    from vllm.platforms import current_platform

    known = current_platform.is_cpu() or current_platform.is_cuda_alike()
    if not known:
        LOG.warning(
            "lorafx has no kernels for %s, so vLLM computes LoRA itself",
            current_platform.device_name,
        )
    return bool(known)


def _lora_wrapper(replaced: Any) -> Any:
    return classmethod(lambda _: "lorafx.integrations.vllm.wrapper.LoraWrapper")


def _compiled_with_lora(replaced: Any) -> Any:
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        lora_config = vllm_config.lora_config
        if cls.device_type == "cpu":
            vllm_config.lora_config = None
        try:
            replaced.__func__(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora_config
        if lora_config is not None and isinstance(vllm_config.additional_config, dict):
            vllm_config.additional_config["lorafx"] = generators()

    return classmethod(check_and_update_config)


@functools.cache
def generators() -> str:
    """A hash of all that generates kernels, whose ids are constants of vLLM's compiled graphs. In
    vLLM's configuration, it keeps graphs on disk from those of another lorafx or processor."""
    folder = Path(str(resources.files("lorafx.kernels")))
    files = sorted(p for p in folder.rglob("*.*") if p.suffix in (".py", ".cpp", ".h", ".jinja"))
    parts = [path.read_bytes() for path in files] + [best_isa().name.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _with_site(replaced: Any) -> Any:
    def set_mapping(self: Any, punica_wrapper: Any) -> None:
        replaced(self, site_of(self, punica_wrapper))

    return set_mapping


def site_of(layer: Any, wrapper: Any) -> Any:
    """What `layer` calls for LoRA: its site, made here; `wrapper` itself for a classifier's head,
    which vLLM knows by it, and where the wrapper is vLLM's own."""
    if not isinstance(wrapper, LoraWrapper):
        return wrapper
    from vllm.lora import layers as known
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    sharded = (
        known.ColumnParallelLinearWithShardedLoRA,
        known.QKVParallelLinearWithShardedLoRA,
        known.MergedColumnParallelLinearWithShardedLoRA,
        known.MergedQKVParallelLinearWithShardedLoRA,
        known.RowParallelLinearWithShardedLoRA,
    )
    # vLLM 0.33 has a class for heads of tokens too, beside the one for heads of requests.
    head = getattr(known, "BaseClassificationHeadWithLoRA", known.ClassificationHeadWithLoRA)
    if isinstance(layer, head):
        return wrapper
    for classes, make in (
        (sharded, sites.ShardedSite),
        (BaseLinearLayerWithLoRA, sites.LinearSite),
        (known.VocabParallelEmbeddingWithLoRA, sites.EmbeddingSite),
        (known.LogitsProcessorWithLoRA, sites.LogitsSite),
        (known.FusedMoEWithLoRA, sites.ExpertsSite),
    ):
        if isinstance(layer, classes):
            return make(wrapper, layer)
    raise UnsupportedVersionError(
        f"{type(layer).__name__} is no layer of vLLM's that lorafx computes LoRA for; leave it out "
        "by --lora-target-modules, or let vLLM compute LoRA by LORAFX_VLLM=off"
    )


def _embedding(replaced: Any) -> Any:
    def forward(self: Any, x: Any) -> Any:
        if not isinstance(self.punica_wrapper, sites.EmbeddingSite):
            return replaced(self, x)
        return self.punica_wrapper.add_lora_embedding(self.base_layer.forward(x), x)

    return forward


def _checked(replaced: Any) -> Any:
    def load(self: Any, lora_request: Any) -> Any:
        from vllm.lora.utils import get_adapter_absolute_path

        loaded = replaced(self, lora_request)
        manager = self._adapter_manager
        if isinstance(next(iter(manager.punica_wrapper_mapping.values())), LoraWrapper):
            folder = get_adapter_absolute_path(lora_request.lora_path)
            check_reading(loaded, folder, manager)
        return loaded

    return load


def _ranks_are_read(replaced: Any) -> Any:
    def activate_adapter(self: Any, lora_id: int) -> bool:
        written = replaced(self, lora_id)
        if written:
            slot = self.lora_index_to_id.index(lora_id)
            for module in self.modules.values():
                if isinstance(module.punica_wrapper, sites.LayerSite):
                    module.punica_wrapper.read_ranks(slot)
        return written

    return activate_adapter


def _experts_with_lora(replaced: Any) -> Any:
    def select_unquantized_moe_backend(moe_config: Any) -> Any:
        from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
        from vllm.platforms import current_platform

        if not (current_platform.is_cpu() and moe_config.is_lora_enabled):
            return replaced(moe_config)
        return UnquantizedMoeBackend.CPU, experts_class()

    return select_unquantized_moe_backend


#: In the order in which they run.
PATCHES = (
    Patch(
        "vllm.platforms.current_platform",
        "get_punica_wrapper",
        _lora_wrapper,
        "names lorafx's wrapper, which has the slots of a step's rows",
    ),
    Patch(
        "vllm.platforms.current_platform",
        "check_and_update_config",
        _compiled_with_lora,
        "on a CPU, compiles a model with LoRA as one without; names lorafx's kernels in the "
        "configuration, so that graphs on disk are theirs",
    ),
    Patch(
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method",
        "select_unquantized_moe_backend",
        _experts_with_lora,
        "on a CPU, experts with LoRA between their two products",
    ),
    Patch(
        "vllm.lora.layers.BaseLayerWithLoRA",
        "set_mapping",
        _with_site,
        "makes a layer's stacked factors views of a bank, and has it call lorafx",
    ),
    Patch(
        "vllm.lora.layers.VocabParallelEmbeddingWithLoRA",
        "forward",
        _embedding,
        "looks factors up by token and slot in one operator",
    ),
    Patch(
        "vllm.lora.worker_manager.WorkerLoRAManager",
        "_load_adapter",
        _checked,
        "refuses an adapter that vLLM reads otherwise than lorafx",
    ),
    Patch(
        "vllm.lora.model_manager.LoRAModelManager",
        "activate_adapter",
        _ranks_are_read,
        "reads the ranks from what vLLM wrote into a slot",
    ),
)
