"""Where a call stands that Dynamo traces: how torch is set, and which modules' calls it is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch._dynamo.variables import nn_module

#: torch's own global state, and what else intercepts its functions.
Modes: TypeAlias = tuple[Any, tuple[Any, ...]]


def modes(tx: Any) -> Modes:
    """How torch is set, and what intercepts its functions."""
    functions = tx.symbolic_torch_function_state
    return (
        torch._C._dynamo.guards.GlobalStateGuard(),
        (
            len(functions.mode_stack),
            functions.torch_function_mode_enabled,
            functions.torch_function_subclass_enabled,
        ),
    )


def still(before: Modes, tx: Any) -> bool:
    """Whether torch is set as it was."""
    return bool(before[0].check()) and before[1] == modes(tx)[1]


class Stacks:
    """In which modules' calls the operators of a replayed layer are.

    Args:
        traced: the layer that was traced. `name` is that of its call, which was in `outer` others;
            `calls` says of each module, by name, how often it was called before, and then.
        layer: Dynamo's image of the one that is replayed.
    """

    def __init__(
        self,
        traced: nn.Module,
        name: str,
        outer: int,
        calls: Mapping[str, tuple[int, int]],
        layer: Any,
        tx: Any,
    ) -> None:
        self._traced_name, self._traced_calls, self._depth = name, calls, outer
        self._calls: dict[str, int] = tx.num_calls
        self._outer = dict(tx.nn_module_stack)
        modules = zip(traced.modules(), layer.value.modules(), strict=True)
        self._modules = {str(id(mine)): str(id(other)) for mine, other in modules}
        before = dict(self._calls)
        with nn_module.record_nn_module_stack(
            str(id(layer.value)), layer.get_nn_module_stack_source(), tx, layer.value
        ):
            self._name = str(list(tx.nn_module_stack.values())[-1][0])
        self._calls.clear()
        self._calls.update(before)
        self._known: dict[tuple[str, ...], dict[str, Any]] = {}

    def _named(self, name: str) -> str:
        mine = self._traced_name
        return self._name + name[len(mine) :] if f"{name}.".startswith(f"{mine}.") else name

    def of(self, node: fx.Node) -> dict[str, Any]:
        stack = node.meta.get("nn_module_stack") or {}
        if tuple(stack) not in self._known:
            found = dict(self._outer)
            for key, (name, kind) in list(stack.items())[self._depth :]:
                module, _, number = key.partition("@")
                before = self._traced_calls.get(name, (0, 0))[0]
                number = int(number or 0) - before + self._calls.get(self._named(name), 0)
                module = self._modules.get(module, module)
                found[f"{module}@{number}" if number else module] = self._named(name), kind
            self._known[tuple(stack)] = found
        return dict(self._known[tuple(stack)])

    def count(self) -> None:
        """The calls have been made."""
        for name, (_, count) in self._traced_calls.items():
            name = self._named(name)
            self._calls[name] = self._calls.get(name, 0) + count
