"""load_weights: checkpoint tensors into a model that does not serve yet.

    (name, tensor) ─▶ stacked mapping, or what names mean to updates (lorafx.base_weights) ─▶ writes

`q_proj.weight`, `k_proj.weight`, `v_proj.weight` go into slices of `qkv_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lorafx.layers.quantization import QuantizeMethodBase
from lorafx.model.module_graph import ModuleGraph

if TYPE_CHECKING:
    from lorafx.base_weights.sources import Source
    from lorafx.base_weights.stacked import Stacked
    from lorafx.base_weights.update_plan import UpdatePlan


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    stacked: Sequence[Stacked] | None = None,
    strict: bool = True,
) -> set[str]:
    """Load checkpoint tensors into the parameters and persistent buffers of `model`.

    Args:
        weights: (name, tensor) pairs, taken one at a time, under any of the names that updates
            take (docs/base_weights.md). A mapping, or a list or tuple of pairs, is checked as a
            whole before anything is written; of another iterable each tensor is checked before it
            is written, and nothing is written after the first problem.
        stacked: (name in the model, name in the checkpoint, shard id), e.g.
            ("qkv_proj", "q_proj", "q"), ("in_proj_qkvz", "in_proj_qkv", (0, 1, 2)). Goes before
            what the model and its modules declare in `packed_modules_mapping`.
        strict: tensors that the model has no place for, and parts of it that got no tensor, are
            errors too.

    Returns:
        Names of the parameters and buffers that were loaded, wholly or partly. Of tied ones
        all names.

    Raises:
        CheckpointError: all unknown, missing, duplicate and misshapen names, in one.
        ConfigError: a `packed_modules_mapping` of another form.
    """
    # They need the layers of this package, which is still being imported when this module is.
    from lorafx.base_weights.sources import source_of
    from lorafx.base_weights.stacked import StackedResolver
    from lorafx.base_weights.update_plan import UpdatePlan
    from lorafx.base_weights.weight_places import memory_key

    resolver = StackedResolver(ModuleGraph.of(model), model, stacked or ())
    source = source_of(weights)
    plan = UpdatePlan(resolver, strict=strict, stable=source.stable, live=False)
    if source.repeatable:
        for item in source.items():
            plan.take(item)
        plan.finish()
    _write(source, plan)
    filled = plan.filled()
    for module in dict.fromkeys(target.module for target in filled):
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)
    keys = {target.key for target in filled}
    state = model.state_dict(keep_vars=True)
    return {n for n, t in state.items() if isinstance(t, Tensor) and memory_key(t) in keys}


def _write(source: Source, plan: UpdatePlan) -> None:
    """Write what the plan found places for; what cannot be read twice is planned as it comes."""
    from lorafx.base_weights.writer import Writer

    writer = Writer(None, stable=source.stable)
    for item in source.items():
        meaning = plan.meanings.get(item.name) if source.repeatable else plan.take(item)
        if meaning is not None and not plan.problems:
            writer.put(meaning, item.read())
    if not source.repeatable:
        plan.finish()
