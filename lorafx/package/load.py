"""Packages in service: adapters by name, in the slots of banks that the compiled code reads.

The banks are the package's constants, in memory that this process owns. So an adapter is exchanged
by writing its slot, and nothing is compiled. Neither the model's code nor lorafx's compiler is
needed: torch, safetensors, and the part of lorafx that reads and keeps adapters.
"""

from __future__ import annotations

import inspect
import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafx.adapter_store.names import AdapterName
from lorafx.adapter_store.peft_reader import read_adapter
from lorafx.adapter_store.saved import origin_of
from lorafx.adapter_store.store import AdapterStore
from lorafx.errors import (
    BatchError,
    CapacityError,
    CheckpointError,
    ConfigError,
    OutOfRangeError,
    UnsupportedAdapterError,
    respelled,
)
from lorafx.package.stand_in import FORMAT, KEY, REFUSED, constants_of, substitute_for
from lorafx.runtime.requests import Requests, requests_of

#: In the place of settings that no package can be exported with.
_NO_ROOM = "packages hold low-rank factors alone, so merge it by export_merged(name, folder)"


def load(path: str | os.PathLike[str]) -> Package:
    """The package that `lorafx.export` wrote (docs/guides/export.md). No adapter is loaded yet.

    Raises:
        CheckpointError: there is no such file, or it is no such package, or this torch or this
            processor cannot run it.
    """
    return Package(os.fspath(path))


class Package:
    """A loaded package: a model whose batches may mix adapters. Calls from several threads wait for
    one another.

    Attributes:
        inputs: the names of its inputs, with their sizes: numbers, or the names of dynamic ones.
    """

    def __init__(self, path: str) -> None:
        self._model, description = _opened(path)
        self._places = description["inputs"][1:]
        self._form, self._limits = description["output"], description["limits"]
        self.inputs = {place["name"]: tuple(place["shape"]) for place in self._places}
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self._signature = inspect.Signature([inspect.Parameter(name, kind) for name in self.inputs])
        self._sites = substitute_for(description)
        self._store = AdapterStore(self._sites.groups, self._sites.config.max_adapters)
        held = set(self._model.get_constant_fqns())
        constants = constants_of(self._sites.groups)
        self._banks = {name: tensor for name, tensor in constants.items() if name in held}
        self._model.load_constants(self._banks, check_full_update=False, user_managed=True)
        self._lock = threading.Lock()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters."""
        return self._store.names

    def __call__(
        self, *inputs: Tensor, adapter_names: Sequence[AdapterName] | None = None, **named: Tensor
    ) -> Any:
        """The model's output, with mappings as dicts.

        Args:
            *inputs, **named: the tensors of the example with which the model was exported.
            adapter_names: one name per request, or a sum as in `CompiledModel.forward`; None and
                "__base__" are the base model. Without names all rows are the base's.

        Raises:
            ConfigError: other inputs than the package's.
            BatchError: an input's sizes or dtype do not fit, or names do not fit the batch.
            UnknownAdapterError: a name that is not loaded.
            CapacityError: more distinct adapters than slots.
            OutOfRangeError: an index outside of its table.
        """
        tensors, rows = self._checked(inputs, named)
        requests = requests_of(adapter_names) or Requests((None,), uniform=True)
        names = requests.of_rows(rows)
        with self._lock:
            slots = torch.tensor(self._store.acquire(names), dtype=torch.int32)
            try:
                results = self._model.loader.boxed_run([slots, *tensors])
            except RuntimeError as error:
                _, refused, message = str(error).partition(REFUSED)
                if not refused:
                    raise
                raise OutOfRangeError(message.partition("\n")[0]) from error
        return _filled(self._form, results)

    def load_adapter(self, source: Any, name: str, *, strict: bool = False) -> None:
        """Load an adapter, in place of one of the same name. Sources and errors are those of
        `CompiledModel.load_adapter`; names of modules are those that the model has now."""
        model, sites, _, config = self._sites
        try:
            adapter = read_adapter(
                source,
                name,
                sites,
                model=model,
                max_rank=config.max_rank,
                lora_config=config,
                strict=strict,
            )
            keep = self._store.prepare_load(adapter, origin_of(source))
        except CapacityError as error:
            text = respelled(error, lambda setting: _NO_ROOM if setting.given else None)
            raise CapacityError(text) from error
        if adapter.invocation:
            raise UnsupportedAdapterError(
                f"{name!r} is an aLoRA adapter, which begins at its invocation tokens; packages "
                "have one adapter for all tokens of a request"
            )
        with self._lock:
            keep()

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter. Raises UnknownAdapterError."""
        with self._lock:
            self._store.unload(name)

    def save_banks(self, path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, int]:
        """Write the banks with these adapters in slots, for C++: the package's constants by name,
        as `torch.save` writes a dict. Returns the slot of each name. Raises as a call."""
        with self._lock:
            slots = self._store.acquire(names)
            torch.save({name: tensor.detach() for name, tensor in self._banks.items()}, path)
        return dict(zip(names, slots, strict=True))

    def _checked(
        self, inputs: Sequence[Tensor], named: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], int]:
        """The inputs in order, and the number of requests."""
        try:
            given = self._signature.bind(*inputs, **named).arguments
        except TypeError as error:
            raise ConfigError(f"{error}; the package takes {', '.join(self.inputs)}") from None
        sizes: dict[str, int] = {}
        for place in self._places:
            _check_input(place, given[place["name"]], sizes)
        for name, limit in self._limits.items():
            if sizes[name] > limit:
                raise BatchError(f"{name} is {sizes[name]}, and the model takes up to {limit}")
        return [given[name].contiguous() for name in self.inputs], sizes["batch"]


def _check_input(place: Mapping[str, Any], value: Any, sizes: dict[str, int]) -> None:
    """Raise BatchError or ConfigError for an input that does not fit; notes its dynamic `sizes`."""
    name, dtype, shape = place["name"], place["dtype"], place["shape"]
    if not isinstance(value, Tensor):
        raise ConfigError(f"{name} is a {type(value).__name__}; give a tensor")
    if value.dtype is not getattr(torch, dtype) or value.device.type != "cpu":
        raise BatchError(f"{name} is {value.dtype} on {value.device}; give {dtype} on a CPU")
    expected = [
        sizes.setdefault(size, given) if isinstance(size, str) else size
        for size, given in zip(shape, value.shape, strict=False)
    ]
    if expected != list(value.shape) or len(shape) != value.dim():
        text = ", ".join(
            f"{size} = {sizes[size]}" if size in sizes else str(size) for size in shape
        )
        raise BatchError(f"{name} has shape {tuple(value.shape)}, and the package takes ({text})")
    if not value.numel():
        raise BatchError(f"{name} has shape {tuple(value.shape)}, which holds nothing")


def _opened(path: str) -> tuple[Any, dict[str, Any]]:
    """The compiled model of a package, and its description."""
    from lorafx.torch_internals.aoti import aoti_load_package

    try:
        model = aoti_load_package(path)
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        raise CheckpointError(f"{path} cannot be loaded as a package: {text}") from error
    description = json.loads(model.get_metadata().get(KEY, "{}"))
    if description.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no package that this version of lorafx.export wrote; export it again"
        )
    return model, description


def _filled(form: Mapping[str, Any], results: Sequence[Tensor]) -> Any:
    match form:
        case {"tensor": number}:
            return results[number]
        case {"items": items}:
            return {name: _filled(item, results) for name, item in items.items()}
        case {"list": parts}:
            return [_filled(part, results) for part in parts]
    return form["value"]
