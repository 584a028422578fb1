"""Dynamo's guards across processes: each is verified against what it saw, then remade.

Saved is the text of every guarded place (a `Source`). Loading looks places up in the frame to be
compiled and compares the texts; places of the same object must hold one object again, and others
different ones. Guards that lorafx drops are verified too.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from types import CodeType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from lorafx.capture.saved_graphs.fingerprints import PLAIN, Fingerprints, Undescribed, digest
from lorafx.model.runtime import holds_slots
from lorafx.torch_internals.compat import dynamo_config
from lorafx.torch_internals.dynamo import GlobalStateGuard, GuardBuilder, Source
from lorafx.torch_internals.graph_parts import _OpNamespace, tree_map
from lorafx.torch_internals.saved_graphs import (
    CheckFunctionManager,
    Guard,
    GuardManagerWrapper,
    GuardsSet,
    OrderedSet,
    OutputGraphCommon,
    OutputGraphGuardsState,
    ShapeCodeParts,
    _get_closure_vars,
    convert_int_to_concrete_values,
    default_device,
    forward_level,
)

#: Kinds of guards by how the text of their place is made.
_VALUE = frozenset(
    (
        *("ID_MATCH", "EQUALS_MATCH", "CONSTANT_MATCH", "CONSTANT_SUBCLASS_MATCH", "BOOL_MATCH"),
        *("NONE_MATCH", "NOT_NONE_MATCH", "FUNCTION_MATCH", "CLASS_MATCH", "MODULE_MATCH"),
        *("CLOSURE_MATCH", "BUILTIN_MATCH"),
    )
)
_CLASS = frozenset(("TYPE_MATCH", "DUPLICATE_INPUT", "NN_MODULE"))
_LENGTH = frozenset(("SEQUENCE_LENGTH", "EMPTY_NN_MODULE_HOOKS_DICT"))
_KEYS = frozenset(("DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK"))
_MEMBER = frozenset(("DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"))
_ATTRIBUTE = frozenset(("HASATTR", "NOT_PRESENT_IN_GENERIC_DICT"))
#: Guards without place: `SavedGuards.state` and `shapes`.
_STATE = frozenset(
    (
        *("GRAD_MODE", "DETERMINISTIC_ALGORITHMS", "GLOBAL_STATE", "TORCH_FUNCTION_STATE"),
        *("DEFAULT_DEVICE", "AUTOGRAD_SAVED_TENSORS_HOOKS", "SHAPE_ENV"),
    )
)
_SHORT = 64
#: Outside all levels of forward-mode gradients.
_NO_LEVEL = -1


@dataclass(frozen=True)
class GuardedPlace:
    """A guarded place, with the guard's kind and argument."""

    source: Source
    kind: str
    argument: Any = None


@dataclass
class SavedGuards:
    """The guards checked before each call; places of all guards, and their texts; `same`: for each
    place the first with the same object; and torch's global state."""

    guards: list[Guard]
    places: list[GuardedPlace]
    texts: list[str]
    same: list[int]
    key_order: set[Source]
    sizes_strides: dict[Source, Any]
    shapes: ShapeCodeParts | None
    of_aot: list[Any]
    state: str
    device: torch.device | None
    builtins_name: str

    @classmethod
    def of(
        cls, guards: Sequence[Guard], kept: Sequence[bool], output: Any, prints: Fingerprints
    ) -> SavedGuards:
        """Dynamo's new guards for the graph of `output`; Undescribed for a value without text."""
        forward_mode = forward_level() != _NO_LEVEL
        if output.torch_function_mode_stack or output.functorch_layers or forward_mode:
            raise Undescribed("a mode of torch that is on")
        places: dict[GuardedPlace, None] = {}
        for guard in guards:
            kind = guard.create_fn_name()
            if kind not in _STATE:
                places.setdefault(GuardedPlace(guard.originating_source, kind, _argument(guard)))
        texts, same = _look(list(places), output.local_scope, output.global_scope, prints)
        state = output.dump_guards_state()
        return cls(
            guards=[_bare(guard) for guard, keep in zip(guards, kept, strict=True) if keep],
            places=list(places),
            texts=texts,
            same=same,
            key_order=set(state.guard_on_key_order),
            sizes_strides=tree_map(
                convert_int_to_concrete_values, dict(state.input_source_to_sizes_strides)
            ),
            shapes=_shapes(output),
            of_aot=list(state._aotautograd_guards),
            state=state.global_state_guard.__getstate__(),
            device=state.current_device,
            builtins_name=output.name_of_builtins_dict_key_in_fglobals,
        )

    def hold(
        self, f_locals: dict[str, Any], f_globals: dict[str, Any], prints: Fingerprints
    ) -> bool:
        state = GlobalStateGuard().__getstate__()
        forward_mode = forward_level() != _NO_LEVEL
        if state != self.state or default_device() != self.device or forward_mode:
            return False
        try:
            texts, same = _look(self.places, f_locals, f_globals, prints)
        except Exception:  # a missing name, or an error of the model's code
            return False
        return texts == self.texts and same == self.same

    def manager(
        self, code: CodeType, f_locals: dict[str, Any], f_globals: dict[str, Any]
    ) -> GuardManagerWrapper:
        state = OutputGraphGuardsState(
            local_scope=f_locals,
            global_scope=f_globals,
            torch_function_mode_stack=[],
            guard_on_key_order=self.key_order,
            input_source_to_sizes_strides=self.sizes_strides,
            dual_level=_NO_LEVEL,
            functorch_layers=[],
            current_device=self.device,
            global_state_guard=GlobalStateGuard(),
            _guards=GuardsSet(OrderedSet(self.guards)),
            _aotautograd_guards=self.of_aot,
            skip_guards_check=True,  # callers check
            name_of_builtins_dict_key_in_fglobals=self.builtins_name,
        )
        made = CheckFunctionManager(code, OutputGraphCommon(state), shape_code_parts=self.shapes)
        return made.guard_manager


def value_at(
    source: Source, f_locals: dict[str, Any], f_globals: dict[str, Any], seen: dict[Source, Any]
) -> Any:
    """The value of a place, as torch's guards look it up, memoised in `seen`."""
    scope = {"L": f_locals, "G": f_globals, "__builtins__": vars(builtins)}
    return source.get_value(scope, _get_closure_vars(), seen)


def _look(
    places: Sequence[GuardedPlace],
    f_locals: dict[str, Any],
    f_globals: dict[str, Any],
    prints: Fingerprints,
) -> tuple[list[str], list[int]]:
    seen: dict[Source, Any] = {}
    texts: list[str] = []
    same: list[int] = []
    first: dict[int, int] = {}
    held: list[Any] = []  # keeps ids from being reused
    for number, place in enumerate(places):
        value = value_at(place.source, f_locals, f_globals, seen)
        held.append(value)
        texts.append(_text(place, value, prints))
        # Python shares immutable objects freely, and makes methods on access.
        apart = isinstance(value, (*PLAIN, tuple, frozenset, MethodType))
        same.append(number if apart else first.setdefault(id(value), number))
    return texts, same


def _text(place: GuardedPlace, value: Any, prints: Fingerprints) -> str:
    """The text of what the guard compares, or Undescribed."""
    kind, argument = place.kind, place.argument
    if kind == "TENSOR_MATCH":
        return prints.tensor(value)
    if isinstance(value, ModuleType):
        return f"{prints.of(value)} {_names(value)}"
    if kind in _VALUE:
        # Contents of torch.nn modules are guarded at other places.
        return prints.of_class(type(value)) if isinstance(value, nn.Module) else prints.of(value)
    if kind in _CLASS:
        # No guard records the failed lookup of a key.
        looked_up = isinstance(value, dict) and not holds_slots(value)
        keys = sorted(map(prints.loosely, _not_of_torch(value))) if looked_up else ""
        return f"{prints.of_class(type(value))} {digest(keys)}"
    if kind in _LENGTH:
        return f"{prints.of_class(type(value))} {len(value)}"
    if kind in _KEYS or kind in _MEMBER:
        short = kind in _KEYS or len(value) <= _SHORT
        texts = [prints.loosely(key) for key in value] if short else []
        if isinstance(value, (set, frozenset)):
            texts.sort()
        found = f"{prints.of_class(type(value))} {len(value)} {texts}" if short else ""
        return f"{found} {prints.loosely(argument)}: {kind in _KEYS or argument in value}"
    if kind == "HASATTR":
        return f"{prints.of_class(type(value))} {argument}: {hasattr(value, argument)}"
    if kind == "NOT_PRESENT_IN_GENERIC_DICT":
        return f"{prints.of_class(type(value))} {argument}: {argument in vars(value)}"
    raise Undescribed(f"a guard of kind {kind}")


def _not_of_torch(keys: dict[Any, Any]) -> Iterable[Any]:
    """The keys without environment variables that Inductor sets at its first compilation."""
    if keys is not vars(os.environ).get("_data"):
        return keys
    return [key for key in keys if not os.fsdecode(key).startswith("_TORCH")]


def _names(module: ModuleType) -> str:
    """A Python module's public names, since failed lookups have no guards; none of packages."""
    plain = not hasattr(module, "__path__") and not isinstance(module, _OpNamespace)
    return digest(sorted(n for n in vars(module) if not n.startswith("__"))) if plain else ""


def _argument(guard: Guard) -> Any:
    """The guard maker's extra argument, where the text depends on it."""
    if isinstance(guard.create_fn, partial) and guard.create_fn_name() in _MEMBER | _ATTRIBUTE:
        named = guard.create_fn.keywords
        return (
            guard.create_fn.args[0] if guard.create_fn.args else named.get("key", named.get("attr"))
        )
    return None


def _bare(guard: Guard) -> Guard:
    make = guard.create_fn
    if isinstance(make, partial) and make.func in (
        GuardBuilder.TENSOR_MATCH,
        GuardBuilder.NOT_NONE_MATCH,
    ):
        make = make.func
    return replace(
        guard,
        create_fn=make,
        guard_types=None,
        code_list=None,
        obj_weakref=None,
        guarded_class_weakref=None,
        stack=None,
        user_stack=None,
        _hash=None,
    )


def _shapes(output: Any) -> ShapeCodeParts:
    """The graph's expressions over sizes, as in `GuardBuilder.SHAPE_ENV`."""
    fakes = output.shape_env.tracked_fakes or []

    def parts(*languages: str) -> list[Any]:
        found = output.shape_env.produce_guards_verbose(
            [item.fake for item in fakes],
            [item.source for item in fakes],
            input_contexts=[item.symbolic_context for item in fakes],
            source_ref=lambda source: source.name,
            ignore_static=True,
            langs=languages,
        )
        return list(found)

    if dynamo_config.enable_cpp_symbolic_shape_guards:
        with suppress(OverflowError):  # sizes that C++ cannot hold
            python, verbose, cpp = parts("python", "verbose_python", "cpp")
            return ShapeCodeParts(python, verbose, cpp, False, list(cpp.source_to_symbol))
    python, verbose = parts("python", "verbose_python")
    return ShapeCodeParts(python, verbose, None, True, [])
