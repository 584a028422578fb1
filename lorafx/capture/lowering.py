"""Lowerings: from graphs after the passes, and graphs without LoRA, to executables.

inductor    Inductor with generated kernels for the LoRA part; the base as torch.compile has it
triton      the same, with Triton kernels: `plan` and `lower` make the graph, Inductor compiles
    it
reference   aten, run node by node; the base as eager has it
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx

from lorafx.capture.written_back import write_back
from lorafx.config import Options
from lorafx.errors import LorafxWarning, LoweringError
from lorafx.kernels.cpu.compiler import find_compiler
from lorafx.passes.outline.outline import bodies, is_view
from lorafx.program.frame import fake_value
from lorafx.torch_internals.compat import mode_settings
from lorafx.torch_internals.shortcuts import chosen

aten = torch.ops.aten


class Lowering(Protocol):
    """Compiles graphs with LoRA; executables are in AOTAutograd's boxed form."""

    def decompositions(self) -> dict[Any, Callable[..., Any]]: ...

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]: ...


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """Inductor's table without decompositions of matrix products, which `match` has to see."""
    from lorafx.torch_internals.inductor import select_decomp_table

    table = dict(select_decomp_table())
    for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.embedding):
        for overload in op.overloads():
            table.pop(getattr(op, overload), None)
    table[aten.cat.default] = partial(_joined, table[aten.cat.default])
    return table


def _joined(decomposed: Callable[..., Any], tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """`torch.cat` without empty operands, laid out as in eager mode.

    Inductor keeps the layout of a single remaining tensor: a prompt's keys after an empty cache
    would differ from later steps' keys, and each layout would be compiled separately.
    """
    result = decomposed(tensors, dim)
    if result is NotImplemented or all(tensor is tensors[0] for tensor in tensors):
        return result
    return result.clone(memory_format=torch.contiguous_format)


#: Deltas are added in place into a product's output. Inductor's order by peak memory may move such
#: an op behind readers of its result: on torch 2.13, in a graph of 1,500 nodes, a router lost its
#: adapter.
_IN_ORDER = {"reorder_for_peak_memory": False}
#: Omits the timing code of generated modules, several lines for each input.
_NO_HARNESS = {"benchmark_harness": False}


@dataclass(frozen=True)
class InductorLowering:
    """Inductor. Its caches hash the rewritten graph, so a changed pass invalidates them.

    `patches` are settings for a `mode` of torch.compile.
    """

    patches: Mapping[str, Any] = field(default_factory=dict)
    writes_back: bool = False

    def decompositions(self) -> dict[Any, Callable[..., Any]]:
        from lorafx.torch_internals.compat import inductor_config

        with inductor_config.patch(dict(self.patches)):
            return decomposition_table()

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        from lorafx.torch_internals.compat import inductor_config
        from lorafx.torch_internals.inductor import (
            _recursive_joint_graph_passes,
            compile_fx_inner,
            get_static_input_idxs,
        )

        if self.writes_back:
            write_back(gm)
        with inductor_config.patch({**self.patches, **_IN_ORDER, **_NO_HARNESS}):
            # As compile_fx before its inner compile for inference.
            results: Any = gm.graph.output_node().args[0]
            memory = [_viewed(item) for item in results]
            gm = _recursive_joint_graph_passes(gm)
            _keep_apart(gm, memory)
            for module in (gm, *(body for _, body in bodies(gm))):
                output = module.graph.output_node()
                items: Any = output.args[0]
                output.meta["user_visible_output_idxs"] = [
                    index for index, item in enumerate(items) if isinstance(item, fx.Node)
                ]
            # Weights, packed weights and banks have fixed addresses; slots are copied in, as CUDA
            # graphs do with inputs that may move.
            fixed = get_static_input_idxs(0)
            return compile_fx_inner(gm, list(inputs), is_inference=True, static_input_idxs=fixed)


def _viewed(item: Any) -> Any:
    while isinstance(item, fx.Node) and is_view(item) and isinstance(item.args[0], fx.Node):
        item = item.args[0]
    return item


def _keep_apart(gm: fx.GraphModule, memory: Sequence[Any]) -> None:
    """Copy results that have become inputs or views of inputs, as in `n + 0`: AOTAutograd
    overwrites inputs after the graph. `memory`: what the results were views of for AOTAutograd."""
    output = gm.graph.output_node()
    items: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    changed = False
    for place, (item, before) in enumerate(zip(items, memory, strict=True)):
        found = _viewed(item)
        became_input = isinstance(found, fx.Node) and found.op == "placeholder"
        if not became_input or found is before or not isinstance(fake_value(found), Tensor):
            continue
        user = item if item is not found else output
        while user is not output and user.args[0] is not found:
            user = user.args[0]
        with gm.graph.inserting_before(user):
            copy = gm.graph.call_function(torch.ops.aten.clone.default, (found,))
        copy.meta.update(val=fake_value(found).clone())
        if user is output:
            items[place] = copy
        else:
            user.replace_input_with(found, copy)
        changed = True
    if changed:
        output.args = (tuple(items),)
        gm.recompile()


class NodeByNode:
    """A graph run by the interpreter, in AOTAutograd's boxed convention."""

    _boxed_call = True

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph_module = gm
        self._forward = gm.forward

    def __call__(self, arguments: list[Any]) -> Any:
        return self._forward(*arguments)


class ReferenceLowering:
    def decompositions(self) -> dict[Any, Callable[..., Any]]:
        return decomposition_table()

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        return NodeByNode(gm)


def compile_base(
    lowering: Lowering, gm: fx.GraphModule, examples: Sequence[Any]
) -> Callable[..., Any]:
    """The executable of a graph without LoRA: torch.compile's, or the graph itself."""
    if not isinstance(lowering, InductorLowering):
        return gm.forward
    from lorafx.torch_internals.inductor import compile_fx

    # A backward compiled later needs the settings too.
    found = compile_fx(gm, list(examples), config_patches=dict(lowering.patches))
    return cast("Callable[..., Any]", found)


def resolved(options: Options, device: torch.device) -> Options:
    """`options` with "auto" resolved: Triton on CUDA and ROCm devices, else Inductor; on a CPU
    without a C++ compiler plain aten, with a warning."""
    if options.lowering != "auto":
        return options
    if device.type == "cpu":
        try:
            find_compiler()
        except LoweringError as error:
            warnings.warn(f"the model runs in plain aten: {error}", LorafxWarning, stacklevel=3)
            return replace(options, lowering="reference")
    return replace(options, lowering="triton" if device.type == "cuda" else "inductor")


def lowering_for(options: Options, patches: Mapping[str, Any] | None = None) -> Lowering:
    """The lowering named by `Options.lowering`, with settings `patches` of Inductor."""
    if options.lowering == "reference":
        return ReferenceLowering()
    return InductorLowering(
        {**mode_settings(options.mode), **(patches or {})},
        "written_back" in chosen(options.shortcuts),
    )
