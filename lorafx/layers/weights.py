"""load_weights: loads checkpoint tensors into a model that does not serve yet.

    (name, tensor) ─▶ stacked mapping, or what names mean to updates ─▶ writes (lorafx.loading)

`q_proj.weight`, `k_proj.weight`, `v_proj.weight` go into slices of `qkv_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from lorafx.loading.loadable_layer import methods_of
from lorafx.loading.loader import Loading
from lorafx.loading.resolve import StackedName, StackedResolver
from lorafx.loading.sources import source_of
from lorafx.loading.weight_places import memory_key
from lorafx.model.module_graph import ModuleGraph


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    stacked: Sequence[StackedName] | None = None,
    strict: bool = True,
) -> set[str]:
    """Load checkpoint tensors into the parameters and persistent buffers of `model`.

    Args:
        weights: (name, tensor) pairs, taken one at a time, under any of the names that updates
            take (docs/base_weights.md). A mapping, or a list or tuple of pairs, is checked as a
            whole before anything is written; of another iterable each tensor is checked before it
            is written, and nothing is written after the first problem.
        stacked: (name in the model, name in the checkpoint, shard id), e.g.
            ("qkv_proj", "q_proj", "q"), ("in_proj_qkvz", "in_proj_qkv", (0, 1, 2)). It takes
            precedence over what the model and its modules declare in `packed_modules_mapping`.
        strict: tensors that the model has no place for, and parts of it that got no tensor, are
            errors too.

    Returns:
        Names of the parameters and buffers that were loaded, wholly or in part; for tied ones all
        names.

    Raises:
        CheckpointError: all unknown, missing, duplicate and misshapen names, in one.
        ConfigError: a malformed `packed_modules_mapping`.
    """
    resolver = StackedResolver(ModuleGraph(model), model, stacked or ())
    loading = Loading(resolver, source_of(weights), strict=strict, live=False)
    loading.check()
    loading.write()
    filled = loading.plan.filled()
    for module, method in methods_of(filled):
        method.process_weights_after_loading(module)
    keys = {target.key for target in filled}
    state = model.state_dict(keep_vars=True)
    return {n for n, t in state.items() if isinstance(t, Tensor) and memory_key(t) in keys}
