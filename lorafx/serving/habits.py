"""Names that users of PEFT, transformers and torch.compile expect of a compiled model.

Each is served, or refused with the way out: no such habit reaches the raw model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from lorafx.adapter_store.names import members
from lorafx.adapter_store.store import AdapterInfo, info
from lorafx.errors import CaptureError, ConfigError, nearest

if TYPE_CHECKING:
    from lorafx.session.session import Session

#: Names of PEFT, diffusers and vLLM that a compiled model lacks -> what to use.
ELSEWHERE: Mapping[str, str] = {
    "add_lora": "load_adapter(folder, name)",
    "add_weighted_adapter": 'weights by name in calls: adapter_names=[{"sql": 0.7, "chat": 0.3}]',
    "disable_adapter_layers": "disable_adapter(), a block, or set_adapter(None)",
    "enable_adapter_layers": "set_adapter(name)",
    "get_base_model": "model, or detach(), which returns it without marks",
    "get_layer_status": "explain(), or why(path) of one module",
    "get_list_adapters": "list_adapters()",
    "get_model_status": "explain(), or get_adapter(name) of one adapter",
    "get_nb_trainable_parameters": "memory(), in bytes; a compiled model trains nothing",
    "hotswap_adapter": "load_adapter(folder, name), which replaces an adapter of that name",
    "list_loras": "list_adapters()",
    "load_lora_adapter": "load_adapter(folder, name)",
    "load_lora_weights": "load_adapter(folder, name)",
    "merge_adapter": "merge(name)",
    "merge_and_unload": "merge(name), or export_merged(name, folder) to save the merged model",
    "peft_config": "get_adapter(name)",
    "print_trainable_parameters": "memory(), in bytes; a compiled model trains nothing",
    "remove_lora": "unload_adapter(name)",
    "set_adapters": "set_adapter(name), or set_adapter({name: weight, ...}) for a sum",
    "unload": "detach()",
    "unmerge_adapter": "unmerge()",
}


_HUB = "an AdapterSource says what the files do not (revision=, key_mapping=)"
#: Arguments of PEFT, transformers and torch.compile -> why they are not taken, or what to use.
#: False and None ask for nothing.
ARGUMENTS: Mapping[str, str] = {
    "autocast_adapter_dtype": "banks have the dtype that LoraConfig(dtype=...) says",
    "backend": 'for torch.compile(model, backend="lorafx"), lorafx.attach(model, adapters) first',
    "disable": "the model itself is what runs without a compiler",
    "ephemeral_gpu_offload": "LoraConfig(max_adapters=...) bounds what is on the device",
    "fullgraph": "where the model breaks its graph, the pieces are compiled, as explain() shows",
    "is_trainable": "a compiled model trains nothing: train with PEFT, and load what it saves",
    "key_mapping": _HUB,
    "low_cpu_mem_usage": "files are mapped, and LoraConfig(max_host_bytes=...) bounds host memory",
    "revision": _HUB,
    "torch_device": "adapters are where the model is",
}


def refuse_arguments(function: str, misplaced: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise ConfigError for arguments that `function` does not have; what is in `ARGUMENTS` and
    asks for nothing is let pass."""
    if misplaced:
        raise ConfigError(
            f"{function} takes one configuration, or the adapters, after the model; to give both: "
            f"{function}(model, lora_config, adapters=...)"
        )
    for name, value in named.items():
        if name not in ARGUMENTS:
            near = nearest(name, ("lora_config", "adapters", "adapter_name", "mode", "options"))
            raise ConfigError(f"{function} has no argument {name!r}{near}")
        if value is not None and value is not False:
            raise ConfigError(f"{function} takes no {name}={value!r}: {ARGUMENTS[name]}")


class ActiveAdapters(tuple[str, ...]):
    """Names of adapters. PEFT reads `active_adapters`, transformers calls it; both get them."""

    def __call__(self) -> ActiveAdapters:
        return self


class Habits:
    """The part of `CompiledModel` that has the names of other libraries."""

    _session: Session
    set_adapter: Callable[[Any], None]
    unload_adapter: Callable[[str], None]

    @property
    def active_adapter(self) -> str | None:
        """The default of `set_adapter`: the adapter of calls that name none; None is the base. A
        sum reads "0.7·sql + 0.3·style"."""
        return self._session.default

    @property
    def active_adapters(self) -> ActiveAdapters:
        """The adapters of `active_adapter`: none, one, or those of a sum. It may be called too."""
        default = self._session.default
        return ActiveAdapters(() if default is None else members(default))

    def list_adapters(self) -> list[str]:
        """Names of the loaded adapters, in order of loading."""
        return list(self._session.store.names)

    def get_adapter(self, name: str) -> AdapterInfo:
        """What is known of a loaded adapter: source, rank, sites, version, slot, memory.

        Raises:
            UnknownAdapterError: it is not loaded.
        """
        return info(self._session.store, name)

    def delete_adapter(self, name: str) -> None:
        """As `unload_adapter`, under PEFT's name."""
        self.unload_adapter(name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, calls that name no adapter are the base's; then the default is put back.

        It is `set_adapter(None)` for the length of a block, in all threads. Calls that name
        adapters get them. Where blocks of several threads overlap, the last one that ends puts the
        default back. A default that was unloaded inside is not put back.

        Raises:
            ConfigError: an adapter is merged.
            BatchError: as `set_adapter`.
        """
        session, blocks = self._session, self._session.disabling
        with session.lock:
            own = [session.default]
            self.set_adapter(None)
            blocks.append(own)
        try:
            yield
        finally:
            with session.lock:
                at = next(place for place, block in enumerate(blocks) if block is own)
                del blocks[at]
                if at < len(blocks):  # another thread's, or task's, which began in this one
                    blocks[at][0] = blocks[at][0] or own[0]
                elif own[0] is not None and own[0] in session.store:
                    self.set_adapter(own[0])

    def compile(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: this model is compiled already.

        Raises:
            CaptureError: always.
        """
        raise CaptureError(
            "lorafx.compile has compiled this model; call it as it is. Settings of the compiler "
            "are given there: lorafx.compile(model, adapters, mode=..., options={...}). To call "
            "torch.compile yourself, detach() the model, lorafx.attach(model, adapters), and name "
            'the backend: torch.compile(model, backend="lorafx")'
        )

    def __reduce_ex__(self, _: Any) -> NoReturn:
        """Copies and pickles. A copy of the graphs would serve the weights of the original.

        Raises:
            CaptureError: always.
        """
        raise CaptureError(
            "a compiled model cannot be copied or pickled: its graphs and locks belong to this "
            "process and to these weights. Copy or save the model that was given to "
            "lorafx.compile, before it is compiled or after detach(); "
            "lorafx.detach(copy.deepcopy(compiled.model)) is a plain copy of it"
        )
