"""A copy of a model that shares its tensors, so that one can be trained while the other serves.

    module                      a copy, with children, mode, configuration and attributes of its own
    parameter, buffer, tensor   the same object, wherever the module keeps it
    dictionary of parameters    the same: what replaces a parameter replaces it in both
    hook                        the same function, in dictionaries of the copy's own; those for
                                gradients are left out
    other function              the same, or one with the copies of the modules that it holds

Buffers that no checkpoint has, such as tables of positions, go with a state that modules keep
beside them. So these lie in dictionaries of the copy's own, and the others in the same.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial, update_wrapper
from itertools import chain
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorafx.errors import CaptureError
from lorafx.model.marks import MARKS
from lorafx.torch_internals.graph_parts import is_traceable_wrapper_subclass

#: The hooks of a module that run in its forward, and facts about them; then those for gradients.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
_GRADIENT_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def shared_copy(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """The copy of `model`, and a function from its modules to theirs. Raises CaptureError, with the
    model unchanged, if a part of it cannot be copied."""
    modules = dict(model.named_modules())
    memo: dict[int, Any] = {}
    for module in modules.values():
        parts = vars(module)
        kept = [] if parts["_non_persistent_buffers_set"] else [parts["_buffers"]]
        tensors = (*module._parameters.values(), *module._buffers.values())
        memo |= {id(item): item for item in (parts["_parameters"], *kept, *tensors)}
        memo |= {id(parts[name]): _unmarked(parts[name]) for name in _HOOKS}
        memo |= {id(parts[name]): OrderedDict() for name in _GRADIENT_HOOKS}
    del memo[id(None)]
    try:
        with _Sharing():
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"this {type(model).__name__} cannot be copied without its tensors, as a sampler needs "
            f"it: {type(error).__name__}: {error}"
        ) from error
    originals = {id(module) for module in modules.values()}
    for module in modules.values():
        attributes = vars(memo[id(module)])
        for name, value in attributes.items():
            if any(id(held) in originals for held in _held_by(value)):
                attributes[name] = _rebound(value, memo)
    return copied, lambda module: memo[id(module)]


class _Sharing(TorchFunctionMode):
    """`copy.deepcopy` returns tensors as they are."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def _held_by(value: Any) -> Iterator[Any]:
    """What is within `value`, as far as it is a function, and it itself."""
    seen, pending = set[int](), [value]
    while pending:
        held = pending.pop()
        if id(held) not in seen:
            seen.add(id(held))
            yield held
            pending += _parts(held)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # a cell that is empty
                yield cell.cell_contents


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """The copy of `value` that `memo` has by its identity; a function with those of its parts."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, partial):
        function, *args = (_rebound(part, memo) for part in (value.func, *value.args))
        return partial(function, *args, **{k: _rebound(v, memo) for k, v in value.keywords.items()})
    if isinstance(value, MethodType):
        return MethodType(*(_rebound(part, memo) for part in _parts(value)))
    if not isinstance(value, FunctionType) or value.__closure__ is None:
        return value
    cells = tuple(CellType() for _ in value.__closure__)
    copied = FunctionType(value.__code__, value.__globals__, None, value.__defaults__, cells)
    memo[id(value)] = update_wrapper(copied, value)
    copied.__kwdefaults__, copied.__dict__ = value.__kwdefaults__, dict(vars(value))
    for cell, held in zip(cells, value.__closure__, strict=True):
        with suppress(ValueError):
            cell.cell_contents = _rebound(held.cell_contents, memo)
    return copied


def _unmarked(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    return OrderedDict((n, hook) for n, hook in hooks.items() if not isinstance(hook, MARKS))


def follow_hooks(module: nn.Module, copied: nn.Module, known: set[int]) -> None:
    """Give the copy the present hooks of `module`; `known` are those that it had, by number."""
    for name in _HOOKS:
        theirs, own = _unmarked(vars(module)[name]), vars(copied)[name]
        for number in known & own.keys() - theirs.keys():
            del own[number]
        own.update(theirs)
        known.update(theirs)


def follow_buffers(module: nn.Module, copied: nn.Module) -> None:
    """Give the copy the buffers of `module` that checkpoints have."""
    for name, buffer in module._buffers.items():
        if name not in module._non_persistent_buffers_set:
            copied._buffers[name] = buffer


class Contents:
    """The children, parameters and buffers of some modules, and where they lie, and forwards of
    their own, compared in C."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._attributes = list(map(vars, modules))
        self._holders: list[dict[str, Any]] = [
            part for m in modules for part in (m._modules, m._parameters, m._buffers) if part
        ]
        self._values = self._present()
        self.tensors = [v for v in self._values if isinstance(v, Tensor) and not v.is_inference()]
        self._plain = [t for t in self.tensors if not is_traceable_wrapper_subclass(t)]
        self._addresses = list(map(Tensor.data_ptr, self._plain))
        self._versions = list(map(_VERSION, self.tensors))

    @property
    def intact(self) -> bool:
        """Whether these are the same objects, at the same addresses."""
        present = self._present()
        return (
            len(present) == len(self._values)
            and all(map(operator.is_, present, self._values))
            and list(map(Tensor.data_ptr, self._plain)) == self._addresses
        )

    def written(self) -> bool:
        """Whether torch has seen a write into the tensors since the last time."""
        before, self._versions = self._versions, list(map(_VERSION, self.tensors))
        return before != self._versions

    def _present(self) -> list[Any]:
        held = chain.from_iterable(map(_VALUES, self._holders))
        return [*held, *map(own_forward, self._attributes)]


#: What replaces the forward of a module's class, by the module's attributes; None if nothing does.
own_forward = operator.methodcaller("get", "forward")
_VALUES = operator.methodcaller("values")
_VERSION = operator.attrgetter("_version")
