"""The public entry points: `compile`, `sampler`, `explain`, `why` and `profile`.

What compiles, and what looks inside, is imported when it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Never, TypeVar

from torch import nn

from lorafx.capture.saved_graphs.folder import AUTO, folder_of
from lorafx.compiled_model.compiled import CompiledModel, compiled_of, refuse_compiled, refuse_other
from lorafx.compiled_model.names import refuse_arguments
from lorafx.compiled_model.sampler import Sampler, Trained
from lorafx.config import Options
from lorafx.errors import CapacityError, ConfigError, LorafxWarning
from lorafx.program.stack import unwrapped
from lorafx.runtime.example_inputs import as_call
from lorafx.runtime.marking import Marked, mark, request_of
from lorafx.runtime.tiers import Tiers, starts_eagerly
from lorafx.torch_internals.versions import entrance

if TYPE_CHECKING:
    from lorafx.inspection.explanation import Explanation
    from lorafx.inspection.profile import Profile
    from lorafx.inspection.why import Why


def compile(
    model: nn.Module,
    lora_config: Any = None,
    *misplaced: Never,
    adapters: Mapping[str, Any] | Sequence[Any] | None = None,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    dynamic: bool | None = True,
    mode: str | None = None,
    options: Options | Mapping[str, Any] | None = None,
    **elsewhere: Never,
) -> CompiledModel:
    """Compile `model` for inference with many LoRA adapters, each row of a batch with its own.

    The model's modules stay as they are and where they are; LoRA is a rewrite of its captured
    graphs. Sibling weights that are packed become views of one buffer, with the same values.

    Args:
        model: any `nn.Module`. Adapters that PEFT has put into it are taken over, from a
            `peft.PeftModel` (which raises until `detach`; see `sampler` for one that is trained) or
            from transformers' `load_adapter`. PEFT's wrappers are removed, and the active adapter,
            or the sum of several, becomes the default.
        lora_config: a `LoraConfig`, a `peft.LoraConfig` or its dict, an adapter, a mapping name ->
            adapter or a list of folders (these adapters are loaded too), or None for the modules
            that `adapters` target, or every linear where there are none. An adapter is a folder, a
            file, a name on the hub, the bytes of a file, tensors by name, or an `AdapterSource`
            (docs/adapters.md).
        adapters: name -> adapter, loaded before the first call; or a list of folders, files or
            names on the hub, where an adapter's name is the last part of its path.
        example_inputs: keyword arguments (or positional ones) of a call with which graphs are
            captured at once; otherwise the first calls capture graphs.
        dynamic: as in `torch.compile`: True captures graphs for any batch size and length, False
            one for each, and None one for the first and another for all that differ from it.
        mode: as in `torch.compile`; the same as `Options.mode`.
        options: an `Options` or its dict.
        *misplaced, **elsewhere: arguments of torch.compile and PEFT: refused with the way out,
            unless False or None.

    Raises:
        ConfigError, TargetError: a configuration that cannot be honoured.
        CheckpointError, CapacityError: an adapter that cannot be read.
        CaptureError: the model is already compiled or attached, or shares modules with an attached
            one. It may share modules with compiled models, as a draft does with its target.

    It also raises what a call with `example_inputs` raises. After an error the model's modules and
    hooks are as they were.
    """
    refuse_arguments("lorafx.compile", misplaced, elsewhere)
    refuse_compiled(model)
    options = _checked(options, dynamic)
    if mode is not None:
        options = replace(options, mode=mode)
    with entrance():
        marked = mark(model, lora_config, adapters, options)
        compiled = _served(CompiledModel, marked, dynamic)
    if example_inputs is not None:
        try:
            compiled.capture(*as_call(example_inputs))
        except BaseException:
            compiled.detach()
            raise
    return compiled


def sampler(
    peft_model: nn.Module,
    options: Options | Mapping[str, Any] | None = None,
    *,
    lora_config: Any = None,
    dynamic: bool | None = True,
) -> Sampler:
    """A compiled model on the weights of a model that is being trained, in the same process.

    The model stays as it is: it can be trained, called and saved as before. The sampler shares its
    parameters, so there is no second copy of the base, and serves its adapters in the versions of
    the last `Sampler.sync` (docs/guides/training.md). It is in evaluation mode, without dropout,
    whatever mode the model is in. The active adapter becomes the default, as for `compile`.

    Args:
        peft_model: a `peft.PeftModel`, or a model into which PEFT or transformers put adapters.
        options: as for `compile`. Weights are not packed unless `passes` asks for it, since that
            would move parameters of the model that is trained.
        lora_config: a `LoraConfig`, for more slots or ranks than the present adapters need.
        dynamic: as for `compile`.

    Raises, with nothing changed:
        CheckpointError, UnsupportedAdapterError, CapacityError: an adapter that cannot be served,
            or is merged into the base weights; or the model has none.
        ConfigError: as for `compile`.
        CaptureError: lorafx has compiled the model; it cannot be copied without its tensors; or its
            parameters are sharded (FSDP, ZeRO-3).
    """
    refuse_compiled(peft_model)
    options = _checked(options, dynamic)
    options = replace(options, passes={"pack": False, **options.passes})
    with entrance():
        trained = Trained(unwrapped(peft_model))
        marked = mark(trained.copy, lora_config, None, options)
        compiled = _served(Sampler, marked, dynamic)
    compiled.follow(trained)
    return compiled


def _checked(options: Options | Mapping[str, Any] | None, dynamic: object) -> Options:
    options = Options.of(options)
    if dynamic is not None and not isinstance(dynamic, bool):
        raise ConfigError(f"dynamic is True, False or None, as in torch.compile; got {dynamic!r}")
    if options.batch_invariant and dynamic is not True:
        raise ConfigError(
            "Options(batch_invariant=True) needs dynamic=True: a graph for one size may add in an "
            "order of its own"
        )
    if options.cache and options.cache != AUTO:
        folder_of(options.cache)  # raises if it cannot be used
    return options


C = TypeVar("C", bound=CompiledModel)


def _served(kind: type[C], marked: Marked, dynamic: bool | None) -> C:
    compiled = kind(marked.program, marked.attachment, marked.store, dynamic)
    try:
        if starts_eagerly(marked.program):
            compiled._entries.tiers = Tiers(compiled._session)
        else:
            marked.program.pack_watch.pack()
        if marked.taken_over is not None:
            _set_default(compiled, marked.taken_over.active)
    except BaseException:
        CompiledModel.detach(compiled)
        raise
    return compiled


def explain(
    model: nn.Module, lora_config: Any = None, *, options: Options | Mapping[str, Any] | None = None
) -> Explanation:
    """What `lora_config` would make of `model`; nothing runs and nothing changes.

    The model may be on the meta device (`with torch.device("meta")`, accelerate's
    `init_empty_weights`): no weight is read, and banks are computed there. The report has the
    sites, the modules that carry no LoRA and why, the banks, and bytes. For a marked model leave
    out `lora_config`; the report is then that of `cm.explain()`, with its graphs.

    Args:
        lora_config: as for `compile`; adapters that it names are not loaded.
        options: an `Options` or its dict.

    Raises:
        ConfigError: a configuration that cannot be honoured, or `model` is not an nn.Module.
        TargetError, CheckpointError: as for `compile`.
    """
    from lorafx.inspection.explaining import predicted

    refuse_other(model)
    compiled = compiled_of(model)
    if compiled is not None and lora_config is None:
        return compiled.explain()
    return predicted(model, request_of(lora_config, {}, model).config, Options.of(options))


def why(
    model: nn.Module,
    path: str,
    adapter: str | None = None,
    *,
    inputs: Mapping[str, Any] | Sequence[Any] | None = None,
) -> Why:
    """As `CompiledModel.why`, for a model that `compile` or `attach` returned, or torch.compile for
    such a model. Raises ConfigError also if the model carries no LoRA."""
    return _marked(model).why(path, adapter, inputs=inputs)


def profile(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    adapter_names: Sequence[str | None],
    *,
    calls: int = 10,
) -> Profile:
    """As `CompiledModel.profile`, for a model that `compile` or `attach` returned, or torch.compile
    for such a model. Raises ConfigError also if the model carries no LoRA."""
    return _marked(model).profile(inputs, adapter_names, calls=calls)


def _marked(model: nn.Module) -> CompiledModel:
    refuse_other(model)
    compiled = compiled_of(model)
    if compiled is None:
        raise ConfigError(
            f"this {type(model).__name__} carries no LoRA; call lorafx.attach(model, lora_config) "
            "first. lorafx.explain(model, lora_config) says which modules would carry LoRA"
        )
    return compiled


def _set_default(compiled: CompiledModel, active: Sequence[str]) -> None:
    """Make the adapters that PEFT applied the default, or warn if several of them have no sum."""
    if not active:
        return
    try:
        compiled.set_adapter(dict.fromkeys(active, 1.0))  # a single one is no sum
    except (ConfigError, CapacityError) as error:
        warnings.warn(
            f"the {type(compiled._orig_mod).__name__} applied the adapters {', '.join(active)} at "
            f"once, and there is no sum of them here: {error}. Calls that name no adapter get the "
            "base model; choose a default by set_adapter",
            LorafxWarning,
            stacklevel=4,
        )
