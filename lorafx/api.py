"""The public entry points: `compile`, `attach` and `explain`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lorafx.adapter_store.checkpoint import AdapterState, load_config
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_model import TakenOver, is_peft_model, peft_layers, take_over
from lorafx.adapter_store.peft_reader import Adapter, adapter_target_modules, read_adapter
from lorafx.adapter_store.peft_targets import picked
from lorafx.adapter_store.store import AdapterStore
from lorafx.capture.attached_backend import attach_session
from lorafx.capture.lowering import resolved
from lorafx.capture.pipeline import check_options
from lorafx.capture.program import Program
from lorafx.collector import collection_paused
from lorafx.config import LoraConfig, Options
from lorafx.errors import CaptureError, ConfigError, LorafxWarning, nearest
from lorafx.explain import Explanation, model_sections
from lorafx.model.packing import pack_weights
from lorafx.model.sites import Site
from lorafx.model.targets import AdapterNames
from lorafx.passes.attach import Attach, Attachment, allocate_groups, sessions_of_marks
from lorafx.passes.select import build_sites
from lorafx.progress import progress
from lorafx.serving.attached import session_of, session_of_weight
from lorafx.serving.compiled import CompiledModel


def compile(
    model: nn.Module,
    lora_config: Any = None,
    *,
    adapters: Mapping[str, Any] | None = None,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    dynamic: bool | None = True,
    options: Options | Mapping[str, Any] | None = None,
) -> CompiledModel:
    """Compile `model` for inference with many LoRA adapters, each row of a batch with its own.

    The model's modules stay what and where they are; LoRA is a rewrite of its captured graphs.
    Sibling weights that are packed become views of one buffer, with the same values.

    Args:
        model: any `nn.Module`. Adapters of PEFT that are in it are taken over: of a
            `peft.PeftModel`, which raises until `detach`, or injected by transformers'
            `load_adapter`. PEFT's wrappers are taken out, and what was active is the default.
        lora_config: a `LoraConfig`, a `peft.LoraConfig` or its dict, the path of an adapter
            folder, a mapping name -> folder (which are loaded too), or None: what `adapters`
            target, else every linear.
        adapters: name -> adapter folder, loaded before the first call.
        example_inputs: a call's keyword arguments (or positional ones) to capture graphs with at
            once; otherwise they are captured by the first calls.
        dynamic: as in `torch.compile`; True captures graphs for any batch size and length.
        options: an `Options` or its dict.

    Returns:
        The executable module.

    Raises:
        ConfigError, TargetError: a configuration that cannot be honoured.
        CheckpointError, CapacityError: an adapter that cannot be read.
        CaptureError: the model is compiled or attached already, or shares modules with one that is
            attached. It may share some with compiled ones, as a draft does with its target.
        Whatever a call with `example_inputs` raises.
        The model's modules and hooks are as they were then.
    """
    built, taken = _marked(model, lora_config, adapters, options)
    compiled = CompiledModel(built.program, built.attachment, built.store, dynamic)
    try:
        if taken is not None and taken.active is not None:
            compiled.set_adapter(taken.active)
        if example_inputs is not None:
            _capture(compiled, example_inputs)
    except BaseException:
        compiled.detach()
        raise
    return compiled


def attach(
    model: nn.Module,
    lora_config: Any = None,
    *,
    adapters: Mapping[str, Any] | None = None,
    options: Options | Mapping[str, Any] | None = None,
) -> nn.Module:
    """Mark `model` for LoRA and return it, for people who call torch.compile themselves.

        model = lorafx.attach(model, lora_config)
        compiled = torch.compile(model, backend="lorafx")
        with torch.no_grad(), lorafx.adapters(model, ["sql", None, "chat"]):
            compiled(input_ids)

    Outside of `lorafx.adapters` it is the base model. Without a compiler it serves batches of one
    adapter. `lorafx.detach(model)` takes the marks away again.

    Args:
        model, lora_config, adapters: as for `compile`; of a `peft.PeftModel` its base model is
            marked and returned.
        options: as for `compile`; they hold for every graph of the model.

    Raises:
        As `compile`; the model's modules and hooks are as they were then.
    """
    built, _ = _marked(model, lora_config, adapters, options)
    _refuse_shared_weights(built)
    attach_session(built.program, built.attachment, built.store)
    return built.program.model


def _refuse_shared_weights(built: _Built) -> None:
    """A graph is served by the model whose weights it is called with: no two may share one.
    Compiled models take turns; nobody can see to that where others call the model."""
    for session in sessions_of_marks(built.program.graph):
        built.attachment.detach()
        raise CaptureError(
            f"it shares modules with a {type(session.program.model).__name__} that lorafx.compile "
            "serves; models that share modules are served by lorafx.compile, each of them"
        )
    for site in built.program.sites:
        weight = built.program.weight_of(site)
        other = None if weight is None else session_of_weight(weight)
        if other is not None:
            built.attachment.detach()
            raise CaptureError(
                f"the weight of {site.path} is also one of the {type(other.program.model).__name__}"
                " that is attached already; give one of them a copy, or use lorafx.compile"
            )


def explain(model: nn.Module, lora_config: Any = None) -> Explanation:
    """Sites and banks that `lora_config` gives `model`; nothing runs and nothing is changed.

    `lora_config` is as for `compile`, and so are the errors; adapters that it names are not
    loaded. Bank sizes are computed on the meta device. Of a model that is marked already, without
    `lora_config`: what its graphs are like as well.
    """
    session = session_of(model)
    if session is not None and lora_config is None:
        return Explanation.of(session)
    config, named = _resolve(lora_config, {}, model)
    config = _with_dora(config, named)
    _, sites = build_sites(model, config)
    meta = tuple(replace(site, device=torch.device("meta")) for site in sites)
    groups = allocate_groups(meta, config)
    return Explanation(tuple(model_sections(sites, groups, config)))


@dataclass(frozen=True)
class _Built:
    program: Program
    attachment: Attachment
    store: AdapterStore


def _marked(
    model: nn.Module, lora_config: Any, adapters: Mapping[str, Any] | None, options: Any
) -> tuple[_Built, TakenOver | None]:
    """The marked model with its adapters loaded, and what a `peft.PeftModel` gave for it."""
    settings = Options.of(options)
    check_options(settings)
    sources: dict[str, Any] = dict(adapters or {})
    taken = None
    if isinstance(model, CompiledModel):
        raise CaptureError("this model was compiled by lorafx already; use it, or detach() first")
    if is_peft_model(model) or peft_layers(model):
        taken = take_over(model)
        model = taken.base
        sources = {**taken.adapters, **sources}
    try:
        config, extra = _resolve(lora_config, sources, model)
        with collection_paused():
            named = {**extra, **sources}
            built = _build(model, _with_dora(config, named), settings, named)
    except BaseException:
        if taken is not None:
            taken.restore()
        raise
    if taken is not None:
        built.attachment.on_detach.append(taken.restore)
    return built, taken


def _build(
    model: nn.Module, config: LoraConfig, options: Options, sources: Mapping[str, Any]
) -> _Built:
    if model.training:
        warnings.warn(
            f"{type(model).__name__} is in training mode, so its dropout is active; call eval() "
            "for inference",
            LorafxWarning,
            stacklevel=4,
        )
    graph, sites = build_sites(model, config)
    _check_plan(options, sites)
    options = resolved(options, sites[0].device)
    loaded: list[Adapter] = []
    for name, source in sources.items():
        with progress(f"reading adapter {name}"):
            adapter = read_adapter(
                source,
                name,
                sites,
                model=model,
                max_rank=config.max_rank,
                lora_config=config,
                strict=options.strict,
            )
            loaded.append(adapter)
    attachment = Attach().run(graph, sites, config)
    try:
        store = AdapterStore(attachment.groups, config.max_adapters, config.max_rank)
        for adapter in loaded:
            store.load(adapter)
    except BaseException:
        attachment.detach()
        raise
    packed = []
    # Only the `pack` pass reads packed weights, and what it merges is what `fuse` made.
    if options.passes.get("pack", True) and options.passes.get("fuse", True):
        alone = graph.alone()
        for group in attachment.groups:
            pack = pack_weights(graph, group, alone)
            if pack is not None:
                packed.append(pack)
                for site in group.sites:
                    mark = attachment.marks[site.path]
                    mark.weight, mark.bias = pack.weight, pack.bias
    program = Program(
        model, graph, sites, attachment.groups, tuple(packed), attachment.runtime, config, options
    )
    return _Built(program, attachment, store)


def _check_plan(options: Options, sites: Sequence[Site]) -> None:
    paths = [site.path for site in sites]
    for path in options.plan:
        if path not in paths:
            raise ConfigError(
                f"Options.plan names {path!r}, which is no site{nearest(path, paths)}"
            )


def _capture(compiled: CompiledModel, inputs: Mapping[str, Any] | Sequence[Any]) -> None:
    """Capture the base's graph and the one with adapters."""
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    compiled.capture(args, kwargs)


def _resolve(
    lora_config: Any, sources: Mapping[str, Any], model: nn.Module
) -> tuple[LoraConfig, dict[str, Any]]:
    """(configuration, adapters that it names) from any accepted form."""
    if isinstance(lora_config, LoraConfig):
        if lora_config.target_modules is None and sources:
            targets, _ = _targets_of(sources, model)
            return replace(lora_config, target_modules=targets), {}
        return lora_config, {}
    if lora_config is None:
        if not sources:
            return LoraConfig(), {}
        targets, rank = _targets_of(sources, model)
        return LoraConfig(target_modules=targets, max_rank=rank, max_adapters=_room(sources)), {}
    if isinstance(lora_config, (str, os.PathLike)):
        lora_config = {"default": lora_config}
    if isinstance(lora_config, Mapping) and _is_adapter_mapping(lora_config):
        named = dict(lora_config)
        return _resolve(None, {**named, **sources}, model)[0], named
    return _from_peft(PeftConfig.read(lora_config), sources, model), {}


def _from_peft(peft: PeftConfig, sources: Mapping[str, Any], model: nn.Module) -> LoraConfig:
    targets: Any = peft.target_modules
    exclude: Any = peft.exclude_modules
    if peft.layers_to_transform or peft.target_parameters:
        # Which layers is a condition of PEFT's own, and so are parameters; write out what it picks.
        targets, exclude = picked(peft, model), None
    rank = peft.max_rank or LoraConfig.max_rank
    if sources:
        rank = max(rank, _targets_of(sources, model)[1])
    return LoraConfig(
        target_modules=targets,
        exclude_modules=exclude,
        max_rank=rank,
        max_adapters=_room(sources),
        use_dora=peft.use_dora,
    )


def _with_dora(config: LoraConfig, sources: Mapping[str, Any]) -> LoraConfig:
    """The configuration with room for DoRA where an adapter is."""
    dora = config.use_dora or any(load_config(source).use_dora for source in sources.values())
    return replace(config, use_dora=dora)


def _room(sources: Mapping[str, Any]) -> int:
    return max(LoraConfig.max_adapters, len(sources))


def _is_adapter_mapping(value: Mapping[str, Any]) -> bool:
    """A mapping name -> adapter, told from a PEFT configuration by its keys and values."""
    if not value:
        raise ConfigError("lora_config is an empty mapping; give name -> adapter folder")
    if "peft_type" in value:
        return False
    return all(isinstance(item, (str, os.PathLike, AdapterState)) for item in value.values())


def _targets_of(sources: Mapping[str, Any], model: nn.Module) -> tuple[AdapterNames, int]:
    """Modules that the adapters name, and their largest rank."""
    modules: dict[str, None] = {}
    rank = 1
    for source in sources.values():
        targets = adapter_target_modules(source, model)
        modules.update(dict.fromkeys(targets.modules))
        rank = max(rank, targets.rank)
    return AdapterNames(modules), rank
