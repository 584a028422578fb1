"""Marking a model: the user's request in one form, then sites, adapters, banks, marks and packed
weights. If it fails, the model is restored.

    LoraConfig | PEFT's configuration | adapters, and adapters → LoraConfig, name → AdapterState
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.adapter_store.changed_weight import ChangedWeight
from lorafx.adapter_store.checkpoint import load_state, no_pair, with_factors
from lorafx.adapter_store.extras import rows_wanted
from lorafx.adapter_store.peft_config import PeftConfig, targeted_paths
from lorafx.adapter_store.peft_model import (
    TakenOver,
    is_peft_model,
    peft_layers,
    take_over,
    without_wrappers,
)
from lorafx.adapter_store.peft_reader import adapter_target_modules
from lorafx.adapter_store.places import Places
from lorafx.adapter_store.saved import AdapterSource, AdapterState, Origin, origin_of
from lorafx.adapter_store.store import AdapterStore
from lorafx.config import LoraConfig, Options
from lorafx.errors import CaptureError, ConfigError, LorafxWarning, LoweringError
from lorafx.interrupts import Rollback
from lorafx.kernels.cpu.compiler import check_compiler
from lorafx.model.attachment import Attachment
from lorafx.model.bank import SharedPair
from lorafx.model.extras import class_refusal, token_rooms
from lorafx.model.module_graph import ModuleGraph
from lorafx.model.sites import Site, has_own_forward
from lorafx.model.targets import AdapterNames, Entries, SavedTargets, names
from lorafx.model_passes import run_model_passes
from lorafx.passes.alias import Alias
from lorafx.passes.select import Select
from lorafx.placements import agreed
from lorafx.program.argument_roles import check_names
from lorafx.program.program import Preparation, Program
from lorafx.registry import lookup
from lorafx.runtime.collection import collection_paused
from lorafx.runtime.session import sessions
from lorafx.torch_internals.versions import check_triton


@dataclass(frozen=True)
class Marked:
    """A marked model, and the adapters of PEFT that were taken over from it, if any."""

    program: Program
    attachment: Attachment
    store: AdapterStore
    taken_over: TakenOver | None


def mark(
    model: nn.Module,
    lora_config: Any,
    adapters: Mapping[str, Any] | Sequence[Any] | None,
    options: Any,
) -> Marked:
    """Mark `model`. The arguments and errors are those of `lorafx.compile`; after an error the
    model is as it was."""
    settings = Options.of(options)
    if settings.passes:
        from lorafx.pass_order import pipeline

        pipeline(settings)  # raises for names of passes that there are not
    sources = by_name(adapters)
    model = without_wrappers(model)
    _pack_others()
    taken_over, rollback = None, Rollback()
    try:
        if is_peft_model(model) or peft_layers(model):
            taken_over = take_over(model)
            rollback.add(taken_over.restore)
            model = taken_over.base
            sources = {**taken_over.adapters, **sources}
        with collection_paused():
            arguments = model, lora_config, sources, settings, taken_over, rollback
            return agreed(model, partial(_mark, *arguments))
    except BaseException:
        rollback.run()
        raise


def _pack_others() -> None:
    """Pack the models that still wait for it: a weight that they share with another lies in one
    pack."""
    for session in sessions():
        if not session.program.pack_watch.packed:
            with session.lock, suppress(CaptureError):  # it was moved, and its calls say so
                session.program.pack_watch.pack()


def build_sites(model: nn.Module, config: LoraConfig) -> tuple[ModuleGraph, tuple[Site, ...]]:
    """The module graph of `model` and the sites that `config` selects; nothing is changed.

    Raises:
        CaptureError: the model is, or holds, a wrapper made by torch.compile.
        TargetError: some targets name nothing or cannot carry LoRA; one error lists all of them.
        ConfigError: the targets are specified in an unknown form.
    """
    with collection_paused():
        preparation = Preparation(model, config)
        run_model_passes(preparation, (Alias(), Select()))
    return preparation.graph, preparation.sites


def warn_training(model: nn.Module, stacklevel: int) -> None:
    """Warn that dropout is active in training mode and changes every result."""
    warnings.warn(
        f"{type(model).__name__} is in training mode, so its dropout is active; call eval() for "
        "inference",
        LorafxWarning,
        stacklevel=stacklevel + 1,
    )


def _mark(
    model: nn.Module,
    lora_config: Any,
    sources: Mapping[str, Any],
    options: Options,
    taken_over: TakenOver | None,
    rollback: Rollback,
) -> Marked:
    request = request_of(lora_config, sources, model)
    if taken_over is not None and len(taken_over.active) > 1 and lora_config is None:
        # Banks need room for the sum of the adapters that were active together.
        active = [request.adapters[name] for name in taken_over.active]
        rank = sum(adapter_target_modules(state, model).rank for state in active)
        rank = max(request.config.max_rank, rank)
        request = replace(request, config=replace(request.config, max_rank=rank))
    check_names(request.config.row_dims, model)
    if model.training:
        warn_training(model, stacklevel=5)
    prepared = Preparation(
        model, request.config, options, request.adapters, request.origins, rollback=rollback
    )
    reports = run_model_passes(prepared)
    attachment, store = prepared.attachment, prepared.store
    assert attachment is not None
    assert store is not None
    program = Program(
        model,
        prepared.graph,
        prepared.sites,
        attachment.groups,
        prepared.packed,
        attachment.runtime,
        request.config,
        _resolved(options, prepared.sites[0].device),
        tuple(reports),
    )
    return Marked(program, attachment, store, taken_over)


def _resolved(options: Options, device: torch.device) -> Options:
    """`options` with "auto" resolved: Triton on CUDA and ROCm devices, else Inductor; on a CPU
    without a C++ compiler plain aten, with a warning. Raises UnsupportedVersionError for a triton
    that is not torch's own where its kernels run."""
    if options.lowering == "triton" or (options.lowering == "auto" and device.type == "cuda"):
        check_triton()
        return replace(options, lowering="triton")
    if options.lowering != "auto":
        return options
    if device.type == "cpu":
        try:
            check_compiler()
        except LoweringError as error:
            warnings.warn(f"the model runs in plain aten: {error}", LorafxWarning, stacklevel=4)
            return replace(options, lowering="reference")
    return replace(options, lowering="inductor")


# --- the user's request ---


@dataclass(frozen=True)
class Request:
    """The user's request.

    Attributes:
        config: the sites, ranks and slots.
        adapters: the adapters to load, by name, as they were saved.
        origins: the origins of those that were read from files.
    """

    config: LoraConfig
    adapters: dict[str, AdapterState] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)


def request_of(
    lora_config: Any, adapters: Mapping[str, Any] | Sequence[Any] | None, model: nn.Module
) -> Request:
    """The request for `lora_config` and `adapters` of `lorafx.compile`. The files of each adapter
    are read once.

    Raises:
        ConfigError: `lora_config` or `adapters` have an unknown form.
        CheckpointError, UnsupportedAdapterError: an adapter cannot be read.
    """
    adapters = by_name(adapters)
    if isinstance(lora_config, (list, tuple)):
        lora_config = by_name(lora_config)
    if _is_adapter(lora_config):
        lora_config = {"default": lora_config}
    if isinstance(lora_config, Mapping) and _is_adapter_mapping(lora_config):
        adapters, lora_config = {**lora_config, **adapters}, None
    origins = {name: origin_of(source) for name, source in adapters.items()}
    states = {name: load_state(source, model) for name, source in adapters.items()}
    config = _config_of(lora_config, states, model)
    pair = _pair_for(states.values(), config)
    serves = no_pair if pair is None else partial(_pair_at, Places((), model), pair)
    states = {name: with_factors(state, serves) for name, state in states.items()}
    if pair is not None:  # with room for factors of other pairs, and of other modules
        config = replace(_config_of(lora_config, states, model), scaled_pair=pair)
    dora, biases = config.use_dora, config.lora_bias
    given = Entries(config.modules_to_save)
    found = [p for p, _ in model.named_modules(remove_duplicate=False) if names(given, [p])]
    whole_modules = dict.fromkeys((*given, *found))
    tokens = token_rooms(config.trainable_tokens, model)
    for state in states.values():
        peft = state.config
        dora |= peft.use_dora
        biases |= peft.lora_bias or peft.bias != "none"
        modules, rows = rows_wanted(state, model)
        whole_modules.update(dict.fromkeys(modules))
        tokens.update({path: max(count, tokens.get(path, 0)) for path, count in rows.items()})
    config = replace(
        config,
        use_dora=dora,
        lora_bias=biases,
        modules_to_save=SavedTargets(whole_modules),
        trainable_tokens=tokens,
    )
    from_files = {name: origin for name, origin in origins.items() if origin is not None}
    return Request(config, states, from_files)


def _pair_for(states: Iterable[AdapterState], config: LoraConfig) -> SharedPair | None:
    """The configured pair, else the first that adapters scale, if banks have no room for factors of
    its rank."""
    if config.scaled_pair is not None:
        return SharedPair(*config.scaled_pair)
    weights = (made.weight for state in states for made in state.made.values())
    pairs = (weight.pair for weight in weights if weight is not None)
    return next((p for p in pairs if p is not None and len(p.A) > config.max_rank), None)


def _pair_at(
    places: Places, pair: SharedPair, path: str, weight: ChangedWeight
) -> SharedPair | None:
    """`pair`, if it is that of `weight` and the module at a saved path is a linear that can have a
    weight of each adapter's own."""
    module = places.module(path)
    entry = None if module is None else lookup(module)
    if module is None or entry is None or not entry.is_linear:
        return None
    if entry.output_sizes or class_refusal(entry) or has_own_forward(module, entry):
        return None
    return pair if weight.pair is not None and pair.equals(weight.pair) else None


def by_name(adapters: Mapping[str, Any] | Sequence[Any] | None) -> dict[str, Any]:
    """`adapters` of `lorafx.compile` by name. Those of a list are named after the last part of
    their path, or of their name on the hub.

    Raises:
        ConfigError: two have the same name, or one has no path.
    """
    if adapters is None or isinstance(adapters, Mapping):
        return dict(adapters or {})
    if not isinstance(adapters, (list, tuple)):
        raise ConfigError(
            "adapters are given as name -> adapter, or as a list of folders; got a "
            f"{type(adapters).__name__}"
        )
    named: dict[str, Any] = {}
    for adapter in adapters:
        path = adapter.source if isinstance(adapter, AdapterSource) else adapter
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigError(
                f"a list of adapters holds folders, files or names on the hub, and this one a "
                f"{type(path).__name__}; give name -> adapter"
            )
        name = Path(path).stem if Path(path).is_file() else Path(path).name
        if name in named:
            raise ConfigError(f"two adapters of the list are called {name!r}; give name -> adapter")
        named[name] = adapter
    return named


def config_covering(
    config: LoraConfig, sources: Mapping[str, str | os.PathLike[str]], model: nn.Module
) -> LoraConfig:
    """`config` as it would be if the adapters in these folders were given when compiling. One of
    them is in memory at a time.

    Raises:
        CheckpointError, UnsupportedAdapterError: an adapter cannot be read.
    """
    targets = config.target_modules
    names: dict[str, str] = {}
    for name, source in sources.items():
        widened = request_of(config, {name: source}, model).config
        names |= dict.fromkeys(widened.target_modules or (), name)
        config = replace(widened, target_modules=targets)
    return config if targets is not None else replace(config, target_modules=AdapterNames.of(names))


def _config_of(
    lora_config: Any, adapters: Mapping[str, AdapterState], model: nn.Module
) -> LoraConfig:
    if isinstance(lora_config, LoraConfig):
        if lora_config.target_modules is None and adapters:
            return replace(lora_config, target_modules=_targets_of(adapters, model)[0])
        return lora_config
    if lora_config is not None:
        return _config_from_peft(PeftConfig.read(lora_config), adapters, model)
    if not adapters:
        return LoraConfig()
    targets, rank = _targets_of(adapters, model)
    return LoraConfig(target_modules=targets, max_rank=rank, max_adapters=_slot_count(adapters))


def _config_from_peft(
    peft: PeftConfig, adapters: Mapping[str, AdapterState], model: nn.Module
) -> LoraConfig:
    targets: Any = peft.target_modules
    exclude: Any = peft.exclude_modules
    if peft.layers_to_transform or peft.target_parameters:
        # LoraConfig cannot express PEFT's layers and parameters, so the modules are listed.
        targets, exclude = targeted_paths(peft, model), None
    rank = peft.max_rank or LoraConfig.max_rank
    if adapters:
        rank = max(rank, _targets_of(adapters, model)[1])
    return LoraConfig(
        target_modules=targets,
        exclude_modules=exclude,
        max_rank=rank,
        max_adapters=_slot_count(adapters),
        use_dora=peft.use_dora,
        lora_bias=peft.lora_bias or peft.bias != "none",
        modules_to_save=[
            path
            for path, module in model.named_modules()
            if peft.trains(path) and any(True for _ in module.parameters(recurse=False))
        ],
        trainable_tokens=_token_rooms(peft, model),
    )


def _token_rooms(peft: PeftConfig, model: nn.Module) -> int | dict[str, int]:
    lists = peft.trainable_token_indices
    if "" in lists:  # the input embedding
        return len(lists[""])
    ids_by_path = {path: peft.tokens_of(path) for path, _ in model.named_modules()} if lists else {}
    return {path: len(ids) for path, ids in ids_by_path.items() if ids}


def _slot_count(adapters: Mapping[str, AdapterState]) -> int:
    return max(LoraConfig.max_adapters, len(adapters))


def _is_adapter_mapping(value: Mapping[str, Any]) -> bool:
    """Whether this is a mapping name -> adapter, and not a PEFT configuration as a dict."""
    if not value:
        raise ConfigError("lora_config is an empty mapping; give name -> adapter folder")
    return "peft_type" not in value and all(map(_is_adapter, value.values()))


def _is_adapter(item: Any) -> bool:
    if isinstance(item, Mapping):  # tensors by name
        return bool(item) and all(isinstance(value, Tensor) for value in item.values())
    return isinstance(item, (str, os.PathLike, bytes, AdapterSource, AdapterState))


def _targets_of(adapters: Mapping[str, AdapterState], model: nn.Module) -> tuple[AdapterNames, int]:
    """The modules that the adapters target, and their largest rank."""
    targets = {name: adapter_target_modules(state, model) for name, state in adapters.items()}
    modules = {module: name for name, target in targets.items() for module in target.modules}
    return AdapterNames.of(modules), max((each.rank for each in targets.values()), default=1)
