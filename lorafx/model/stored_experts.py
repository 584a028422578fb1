"""Weights of routed experts that one operator reads at their stored width.

    affine    a tensor that wraps q, scale and maybe zero_point: torchao's int8, fp8, intx
    nf4, fp4  a parameter that bitsandbytes' parametrisation dequantises

`stored_of` says how a weight is stored and where its parts are, which a graph takes as inputs;
`lorafx::stored_grouped_mm` multiplies by them. What the numbers mean follows from the parts' names
and sizes, so a class of another library that has these is read as well; a setting that is not
known, such as one that rounds activations, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lorafx.errors import ConfigError
from lorafx.kernels.cpu.stored_grouped_mm import AFFINE
from lorafx.model.changes_watch import ObjectWatch, SwitchWatch
from lorafx.model.experts import by_lorafx, expert_weights, implementation, is_switched
from lorafx.model.weight_formats import (
    Bitsandbytes4Parameter,
    in_library_format,
    is_dense,
    is_wrapped,
)
from lorafx.placements import is_placed
from lorafx.torch_internals.dynamo import assume_constant_result

#: Settings of a wrapper that change none of the numbers that its parts stand for.
_NEUTRAL = {"block_size", "dtype", "target_dtype", "reduce_range", "mm_config", "kernel_preference"}


class Stored(NamedTuple):
    """How a weight of sizes (E, N, K), or (E, K, N), is stored: the format and parts of
    `lorafx::stored_grouped_mm`, these by their paths below the module, and W's dtype."""

    form: str
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype


@assume_constant_result
def stored_of(module: nn.Module, name: str) -> Stored | str | None:
    """How the weight `name` of a module of experts is stored; None for plain numbers, and for a
    format of which one expert cannot be read alone, a sentence that says so."""
    made = is_parametrized(module, name)
    weight: Any = None if made else getattr(module, name)
    if not made and not is_wrapped(weight) and is_dense(weight):
        return None
    found = _of_four_bits(module, name) if made else _affine(weight, name)
    kind = "by a parametrisation" if made else f"as a {type(weight).__qualname__} of its kind"
    return found or (
        f"{name} of {type(module).__qualname__} is stored {kind}, of which lorafx cannot read one "
        "expert alone; call model.set_experts_implementation('eager')"
    )


def _affine(weight: Any, name: str) -> Stored | None:
    if not is_wrapped(weight):
        return None
    names, settings = weight.__tensor_flatten__()
    known = names in (["qdata", "scale"], ["qdata", "scale", "zero_point"])
    if not known or any(
        value is not None for key, value in settings.items() if key not in _NEUTRAL
    ):
        return None
    q, *tables = (getattr(weight, part) for part in names)
    whole = q.shape == weight.shape and not any(map(is_wrapped, (q, *tables)))
    if not whole or any(table.dim() != 3 for table in tables):
        return None
    paths = tuple(f"{name}.{part}" for part in names)
    return Stored(AFFINE, paths, tuple(weight.shape), weight.dtype)


def _of_four_bits(module: nn.Module, name: str) -> Stored | None:
    maker = Bitsandbytes4Parameter().maker(module, name)
    if maker is None:
        return None
    state, made = maker.quant_state, f"parametrizations.{name}"
    form, parts = f"{state.quant_type}/{state.blocksize}", ["absmax"]
    if state.nested:
        form += f"/{state.state2.blocksize}"
        parts += ["offset", "state2.code", "state2.absmax"]
    paths = (f"{made}.original", *(f"{made}.0.quant_state.{part}" for part in parts))
    return Stored(form, paths, tuple(state.shape), state.dtype)


def parts_of(module: nn.Module, stored: Stored) -> list[Tensor]:
    found = []
    for path in stored.paths:  # a loop that Dynamo traces
        value: Any = module
        for name in path.split("."):
            value = getattr(value, name)
        found.append(value)
    return found


def held_parts(module: nn.Module, name: str) -> list[tuple[str, Tensor]]:
    """The parts of a weight of experts by their paths; none of a plain one, or of one of which one
    expert cannot be read alone."""
    stored = stored_of(module, name)
    if not isinstance(stored, Stored):
        return []
    return list(zip(stored.paths, parts_of(module, stored), strict=True))


class StoredExperts:
    """The weights of a model's experts. Iterated, it gives those that are quantised at present, by
    the module's path, the module and the attribute."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._weights = weights = [
            (path, module, weight.name)
            for path, module in modules
            for weight in expert_weights(module) or ()
        ]
        self._watch = ObjectWatch(lambda: (type(m._parameters.get(n)) for _, m, n in weights))
        self._switch = SwitchWatch(module for _, module, _ in weights)
        #: The states of both at the last check.
        self._checked: tuple[int, int] | None = None
        #: Classes of modules and weights, and implementations, that need no other look.
        self._known: set[tuple[Any, ...]] = set()

    def __iter__(self) -> Iterator[tuple[str, nn.Module, str]]:
        return (item for item in self._weights if in_library_format(*item[1:]))

    def check(self) -> None:
        """Raise ConfigError for a weight whose class lacks an operator of the implementation that
        transformers' switch is at. Each is tried once, by a row, before a call changes a cache."""
        state = self._watch.look(), self._switch.look()
        if state == self._checked:
            return
        for path, module, name in self._weights:
            weight, config = module._parameters.get(name), getattr(module, "config", None)
            key = type(module), type(weight), implementation(config)
            if key not in self._known:
                if is_wrapped(weight) and is_switched(module) and not by_lorafx(module):
                    _try(path, module, name)
                self._known.add(key)
        self._checked = state


def _try(path: str, module: Any, name: str) -> None:
    weight, chosen = module._parameters[name], implementation(module.config)
    (up, _), device = expert_weights(module) or (None, None), weight.device
    if up is None or is_placed(weight):
        return
    x, first = torch.zeros(1, up.in_features, dtype=weight.dtype, device=device), torch.zeros(1, 1)
    try:
        with torch.no_grad():
            module.forward(x, first.to(device, torch.long), first.to(device, weight.dtype))
    except NotImplementedError as error:
        best = "lorafx" if isinstance(stored_of(module, name), Stored) else "eager"
        way = f"call model.set_experts_implementation({best!r})"
        if chosen == best:
            way = f"replace it by a parameter of lorafx.dequantize(module, {name!r})"
        raise ConfigError(
            f"{path}.{name}: {type(weight).__qualname__} has no product for the implementation "
            f"{chosen!r} of {type(module).__qualname__}; {way}"
        ) from error
    except Exception:  # the call's own, if it comes again there
        return
