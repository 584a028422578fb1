"""Dynamo's guards across processes: what they compare is verified when a graph is loaded.

A file has a text of the value at each guarded place (a `Source`). Loading looks the places up in
the frame to be compiled and compares the texts; places that held the same object must do so again,
and others must not. Then the guards are made anew. Guards that lorafx drops are verified too.
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
from lorafx.capture.watched_places import KIND, WatchedPlaces
from lorafx.model.runtime import holds_slots
from lorafx.torch_internals.compat import add_function_guard, dynamo_config
from lorafx.torch_internals.dynamo import GlobalStateGuard, GuardBuilder, Source
from lorafx.torch_internals.frames import guard_argument
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

#: Kinds of guards by what the text of their place is made from.
_VALUE = frozenset(
    (
        *("ID_MATCH", "EQUALS_MATCH", "CONSTANT_MATCH", "CONSTANT_SUBCLASS_MATCH", "BOOL_MATCH"),
        *("NONE_MATCH", "NOT_NONE_MATCH", "FUNCTION_MATCH", "CLASS_MATCH", "MODULE_MATCH"),
        *("CLOSURE_MATCH", "BUILTIN_MATCH"),
    )
)
_TENSOR = frozenset(("TENSOR_MATCH", "TENSOR_SUBCLASS_METADATA_MATCH"))
_CLASS = frozenset(("TYPE_MATCH", "DUPLICATE_INPUT", "NN_MODULE"))
_LENGTH = frozenset(("SEQUENCE_LENGTH", "EMPTY_NN_MODULE_HOOKS_DICT"))
_KEYS = frozenset(("DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK"))
_MEMBER = frozenset(("DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"))
_ATTRIBUTE = frozenset(("HASATTR", "NOT_PRESENT_IN_GENERIC_DICT"))
#: Guards that have no place: `SavedGuards.state`, `shapes` and `watched` stand for them.
_STATE = frozenset(
    (
        *("GRAD_MODE", "DETERMINISTIC_ALGORITHMS", "GLOBAL_STATE", "TORCH_FUNCTION_STATE"),
        *("DEFAULT_DEVICE", "AUTOGRAD_SAVED_TENSORS_HOOKS", "SHAPE_ENV", KIND),
    )
)
#: The most entries of a container that are all part of its text.
_SHORT = 64
#: The level outside of all forward-mode gradients.
_NO_LEVEL = -1


@dataclass(frozen=True)
class GuardedPlace:
    """A guarded place, with the guard's kind and argument."""

    source: Source
    kind: str
    argument: Any = None


@dataclass
class SavedGuards:
    """The guards that are checked before each call, and those for which watched places stand; the
    places of all guards, their texts, and for each the first place with the same object (`same`);
    and torch's global state."""

    guards: list[Guard]
    watched: list[Guard]
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
        cls,
        guards: Sequence[Guard],
        kept: Sequence[bool],
        watched: Sequence[Guard],
        output: Any,
        prints: Fingerprints,
    ) -> SavedGuards:
        """Dynamo's new guards for the graph of `output`. Raises Undescribed if one has no text."""
        forward_mode = forward_level() != _NO_LEVEL
        if output.torch_function_mode_stack or output.functorch_layers or forward_mode:
            raise Undescribed("a mode of torch that is on")
        places: dict[GuardedPlace, None] = {}
        for guard in guards:
            kind = guard.create_fn_name()
            if kind not in _STATE:
                argument = guard_argument(guard) if kind in _MEMBER | _ATTRIBUTE else None
                places.setdefault(GuardedPlace(guard.originating_source, kind, argument))
        texts, same = _texts_at(list(places), output.local_scope, output.global_scope, prints)
        state = output.dump_guards_state()
        return cls(
            guards=[
                _portable(guard)
                for guard, keep in zip(guards, kept, strict=True)
                if keep and guard.create_fn_name() != KIND
            ],
            watched=[*map(_portable, watched)],
            places=list(places),
            texts=texts,
            same=same,
            key_order=set(state.guard_on_key_order),
            sizes_strides=tree_map(
                convert_int_to_concrete_values, dict(state.input_source_to_sizes_strides)
            ),
            shapes=_shape_guards(output),
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
            texts, same = _texts_at(self.places, f_locals, f_globals, prints)
        except Exception:  # a name is missing, or the model's code raised
            return False
        return texts == self.texts and same == self.same

    def watched_places(self, f_locals: dict[str, Any], f_globals: dict[str, Any]) -> WatchedPlaces:
        watched = WatchedPlaces(f_locals.get("self"), f_globals, self.key_order)
        watched.watch(self.watched)
        return watched

    def manager(
        self,
        code: CodeType,
        f_locals: dict[str, Any],
        f_globals: dict[str, Any],
        watched: WatchedPlaces,
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
        common = OutputGraphCommon(state)
        manager = CheckFunctionManager(code, common, shape_code_parts=self.shapes).guard_manager
        watched.guard(partial(add_function_guard, manager.root))
        return manager


def value_at(
    source: Source, f_locals: dict[str, Any], f_globals: dict[str, Any], seen: dict[Source, Any]
) -> Any:
    """The value at a place, as torch's guards look it up; `seen` keeps the values of places."""
    scope = {"L": f_locals, "G": f_globals, "__builtins__": vars(builtins)}
    return source.get_value(scope, _get_closure_vars(), seen)


def _texts_at(
    places: Sequence[GuardedPlace],
    f_locals: dict[str, Any],
    f_globals: dict[str, Any],
    prints: Fingerprints,
) -> tuple[list[str], list[int]]:
    seen: dict[Source, Any] = {}
    texts: list[str] = []
    same: list[int] = []
    first_places: dict[int, int] = {}
    values: list[Any] = []  # so that no id is reused
    for number, place in enumerate(places):
        value = value_at(place.source, f_locals, f_globals, seen)
        values.append(value)
        texts.append(_text(place, value, prints))
        # The identity of immutable objects, which Python shares, and of bound methods says nothing.
        by_value = isinstance(value, (*PLAIN, tuple, frozenset, MethodType))
        same.append(number if by_value else first_places.setdefault(id(value), number))
    return texts, same


def _text(place: GuardedPlace, value: Any, prints: Fingerprints) -> str:
    """The text of what the guard compares. Raises Undescribed if there is none."""
    kind, argument = place.kind, place.argument
    if kind in _TENSOR:
        return prints.tensor(value)
    if isinstance(value, ModuleType):
        return f"{prints.of(value)} {_names_text(value)}"
    if kind in _VALUE:
        # The attributes of a module have guards of their own.
        return prints.of_class(type(value)) if isinstance(value, nn.Module) else prints.of(value)
    if kind in _CLASS:
        # No guard says that a key was looked up and not found.
        may_lack_keys = isinstance(value, dict) and not holds_slots(value)
        keys = sorted(map(prints.loosely, _without_inductors(value))) if may_lack_keys else ""
        return f"{prints.of_class(type(value))} {digest(keys)}"
    if kind in _LENGTH:
        return f"{prints.of_class(type(value))} {len(value)}"
    if kind in _KEYS or kind in _MEMBER:
        short = kind in _KEYS or len(value) <= _SHORT
        texts = [prints.loosely(key) for key in value] if short else []
        if isinstance(value, (set, frozenset)):
            texts.sort()
        contents = f"{prints.of_class(type(value))} {len(value)} {texts}" if short else ""
        return f"{contents} {prints.loosely(argument)}: {kind in _KEYS or argument in value}"
    if kind == "HASATTR":
        return f"{prints.of_class(type(value))} {argument}: {hasattr(value, argument)}"
    if kind == "NOT_PRESENT_IN_GENERIC_DICT":
        return f"{prints.of_class(type(value))} {argument}: {argument in vars(value)}"
    raise Undescribed(f"a guard of kind {kind}")


def _without_inductors(keys: dict[Any, Any]) -> Iterable[Any]:
    """The keys without the environment variables that Inductor sets when it first compiles."""
    if keys is not vars(os.environ).get("_data"):
        return keys
    return [key for key in keys if not os.fsdecode(key).startswith("_TORCH")]


def _names_text(module: ModuleType) -> str:
    """A Python module's names, since no guard says that one was not found; "" for packages."""
    plain = not hasattr(module, "__path__") and not isinstance(module, _OpNamespace)
    return digest(sorted(n for n in vars(module) if not n.startswith("__"))) if plain else ""


def _portable(guard: Guard) -> Guard:
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


def _shape_guards(output: Any) -> ShapeCodeParts:
    """The graph's expressions over sizes, as in `GuardBuilder.SHAPE_ENV`."""
    fakes = output.shape_env.tracked_fakes or []

    def code_in(*languages: str) -> list[Any]:
        code = output.shape_env.produce_guards_verbose(
            [item.fake for item in fakes],
            [item.source for item in fakes],
            input_contexts=[item.symbolic_context for item in fakes],
            source_ref=lambda source: source.name,
            ignore_static=True,
            langs=languages,
        )
        return list(code)

    if dynamo_config.enable_cpp_symbolic_shape_guards:
        with suppress(OverflowError):  # sizes that C++ cannot hold
            python, verbose, cpp = code_in("python", "verbose_python", "cpp")
            return ShapeCodeParts(python, verbose, cpp, False, list(cpp.source_to_symbol))
    python, verbose = code_in("python", "verbose_python")
    return ShapeCodeParts(python, verbose, None, True, [])
