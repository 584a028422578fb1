"""A pipeline of diffusers whose images may each use another adapter.

    cp = lorafx.compile_pipeline(pipe, {"ink": "loras/ink", "clay": "loras/clay.safetensors"})
    cp(prompt=[...], adapter_names=["ink", {"ink": 0.5, "clay": 1.0}, None])

The pipeline's own `__call__` runs, with the compiled forwards of its models; no model is replaced.
By default LoRA goes into the models that the pipeline lists in `_lora_loadable_modules`.
`PromptRows` tracks which prompt each row of a model's input belongs to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor

from lorafx import api
from lorafx.adapter_store.names import BASE, AdapterName, Mixture, members, named_sum
from lorafx.adapter_store.saved import Source
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.compiled_model.names import refuse
from lorafx.config import LoraConfig, Options
from lorafx.eager.following import counted, unfollowed
from lorafx.errors import (
    BatchError,
    ConfigError,
    ReplacedModuleError,
    UnknownAdapterError,
    nearest,
    numbered,
)
from lorafx.inspection.explanation import Explanation
from lorafx.integrations.diffusers.components import (
    encodes_prompts,
    loadable,
    loads_adapters,
    parts_of,
)
from lorafx.integrations.diffusers.followed_prompts import PromptRows
from lorafx.model.keywords import refuse_slips
from lorafx.model.replaced_methods import Replacement
from lorafx.runtime.loading import in_lock_order, load_parts, unload_parts
from lorafx.runtime.marking import by_name, request_of
from lorafx.runtime.requests import Names, Requests, checked_names
from lorafx.runtime.resting import refuse_elsewhere
from lorafx.runtime.session import Session

#: Arguments of denoisers that all rows share: positions of text and image tokens.
SHARED_ARGUMENTS = ("img_ids", "txt_ids", "image_rotary_emb")
#: Arguments of pipelines by which diffusers scales all adapters at once.
_SCALING = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
#: Why `CompiledPipeline` refuses the methods of diffusers' loaders of adapters.
_LOADERS_REFUSED = (
    "is about adapters that diffusers puts into the models, where every image would have them; use "
    "load_adapter(source, name), unload_adapter(name), and adapter_names=[...] in the call"
)


def compile_pipeline(
    pipe: Any,
    adapters: Mapping[str, Source] | Sequence[Any] | None = None,
    *,
    lora_config: LoraConfig | None = None,
    components: Iterable[str] | None = None,
    dynamic: bool | None = True,
    options: Options | Mapping[str, Any] | None = None,
) -> CompiledPipeline:
    """Compile the models of a diffusers pipeline that carry LoRA, so that every image of a batch
    may use another adapter.

    `pipe` and its models are not replaced: a call of `pipe` itself makes the base's images.

    Args:
        pipe: a pipeline of diffusers (`DiffusionPipeline`), on one device. Adapters that
            `pipe.load_lora_weights` put into it are taken over.
        adapters: name -> adapter, loaded before the first call. One file may have parts for the
            denoiser and for text encoders, in any dialect (docs/adapters.md). Or a list of folders,
            files or names on the hub, as for `lorafx.compile`.
        lora_config: the sites, ranks and slots of all models. None chooses what the adapters need,
            with room for sums of any two of them, or every linear if there are no adapters. If each
            model needs its own, compile them by `lorafx.compile` and pass them to
            `CompiledPipeline`.
        components: names of the models that carry LoRA; None for those into which diffusers loads
            adapters.
        dynamic, options: as for `lorafx.compile`.

    Raises:
        ConfigError: `pipe` is no pipeline, or has no models of these names.
        CaptureError: a model is already compiled, or is moved between devices by hooks.
        CheckpointError: an adapter cannot be read, or has a part for a model that is not compiled.

    It also raises what `lorafx.compile` raises. After an error the pipeline is as it was.
    """
    models = loadable(pipe, components)
    if not isinstance(lora_config, LoraConfig | None):
        raise ConfigError(f"lora_config must be a lorafx.LoraConfig, it is {lora_config!r:.80}")
    sources: dict[str, dict[str, Any]] = {name: {} for name in models}
    for adapter, source in by_name(adapters).items():
        for name, part in parts_of(source, pipe, models).items():
            sources[name][adapter] = part
    compiled: dict[str, CompiledModel] = {}
    try:
        for name, model in models.items():
            config = lora_config
            if config is None:
                config = request_of(None, sources[name], model).config
                sums = 2 if len(sources[name]) > 1 else 1
                config = replace(config, max_rank=sums * config.max_rank)
            parameters = inspect.signature(model.forward).parameters
            shared = dict.fromkeys(name for name in SHARED_ARGUMENTS if name in parameters)
            config = replace(config, row_dims={**shared, **config.row_dims})
            compiled[name] = api.compile(
                model, config, adapters=sources[name], dynamic=dynamic, options=options
            )
    except BaseException:
        for cm in compiled.values():
            cm.detach()
        raise
    return CompiledPipeline(pipe, compiled)


#: How a call names adapters.
_BY_PROMPT = {"adapter_names": 'adapter_names=["ink", None, ...], one name or None per prompt'}


class CompiledPipeline:
    """A pipeline that serves its base and many adapters in one batch. Attributes that this class
    lacks are those of `pipe`; `models` has the compiled models by their names in the pipeline. An
    adapter that is loaded into only one of them acts only there."""

    def __init__(self, pipe: Any, models: Mapping[str, CompiledModel]) -> None:
        self.pipe = pipe
        self.models = dict(models)
        # A session's replaced methods are put back in a forked child, too.
        self._replacements = next(iter(self.models.values()))._session.replacements

    def __call__(
        self, *args: Any, adapter_names: Sequence[AdapterName] | None = None, **kwargs: Any
    ) -> Any:
        """The pipeline's own call with an adapter for each prompt.

        All images of a prompt use its adapter, in the denoiser and in the text encoders, for the
        negative prompt as for the prompt. diffusers does the same.

        Args:
            adapter_names: one name per prompt; None or "__base__" is the base,
                {"ink": 0.7, "clay": 0.3} a sum of adapters or one at another scale. Without it all
                images use the adapter that was active when the pipeline was compiled, or none.

        Raises:
            ConfigError: `adapter_names` is not a list of names, or an argument asks diffusers to
                scale adapters.
            BatchError: there are not as many names as prompts, or it is not known which prompt a
                row belongs to.
            ReplacedModuleError: a model of the pipeline was replaced after it was compiled.
            UnknownAdapterError: no adapter of this name is loaded.

        It also raises what a compiled model raises.
        """
        refuse_slips(kwargs, type(self.pipe).__call__, ways=_BY_PROMPT)
        names = checked_names(adapter_names)
        if names is not None and len(set(names)) > 1:
            # Some pipelines encode a single text once, and its row would serve all adapters.
            for name, value in kwargs.items():
                if "negative_prompt" in name and isinstance(value, str):
                    kwargs[name] = [value] * len(names)
        arguments = _bind(self.pipe, args, kwargs)
        self._refuse_replaced_models()
        _refuse_scales(arguments)
        by_model: dict[str, Names | None] = dict.fromkeys(self.models)
        if names is not None:
            _check_count_of_prompts(arguments, len(names))
            self._check_known(names)
            by_model = {name: _with_parts(names, cm.adapters) for name, cm in self.models.items()}
        run: Callable[[], Any] = partial(self._run, by_model, args, kwargs)
        # Every session is in a call until this one ends, so no other call changes its requests.
        by_session = {
            id(cm._session): None if names is None else Requests(tuple(by_model[name] or ()))
            for name, cm in self.models.items()
        }

        def within(session: Session, run: Callable[[], Any]) -> Callable[[], Any]:
            return partial(session.call, lambda: run, by_session[id(session)])

        for session in reversed(in_lock_order(cm._session for cm in self.models.values())):
            run = within(session, run)
        return run()

    def _run(
        self, names: Mapping[str, Names | None], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        mixed = [part for part in names.values() if part is not None and len(set(part)) > 1]
        rows = PromptRows(len(mixed[0])) if mixed else None
        replaced: list[Replacement] = [
            (cm._orig_mod, "forward", partial(_forward_compiled, name, cm, names[name], rows))
            for name, cm in self.models.items()
        ]
        if rows is None:
            return self._replacements.replacing(replaced, self.pipe, *args, **kwargs)
        compiled = {id(cm._orig_mod) for cm in self.models.values()}
        replaced += [
            (module, "forward", partial(_encode, module.forward, rows))
            for module in self.pipe.components.values()
            if encodes_prompts(module) and id(module) not in compiled
        ]
        with counted((args, kwargs)) as (args, kwargs):
            for name, value in _bind(self.pipe, args, kwargs).items():
                rows.label_argument(name, value)
            call = partial(self._replacements.replacing, replaced, self.pipe, *args, **kwargs)
            return rows.run(call)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that are loaded, in one model or in several."""
        return tuple(dict.fromkeys(name for cm in self.models.values() for name in cm.adapters))

    def load_adapter(self, source: Source, name: str, *, strict: bool | None = None) -> None:
        """Load an adapter into all models that it has a part for. It replaces one of the same name.

        Raises what `CompiledModel.load_adapter` raises, and CheckpointError if the adapter has a
        part for a model that is not compiled. After an error no model has changed.
        """
        models = {component: cm._orig_mod for component, cm in self.models.items()}
        parts = parts_of(source, self.pipe, models)
        by_session = [(cm._session, parts.get(component)) for component, cm in self.models.items()]
        load_parts(by_session, name, strict)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter in all models. Raises what `CompiledModel.unload_adapter` raises."""
        self._check_known([name])
        unload_parts([cm._session for cm in self.models.values()], name)

    @property
    def recompiles(self) -> int:
        """Graphs captured so far, of all models."""
        return sum(cm.recompiles for cm in self.models.values())

    def explain(self) -> dict[str, Explanation]:
        """The `Explanation` of each model, by its name in the pipeline."""
        return {name: cm.explain() for name, cm in self.models.items()}

    def detach(self) -> Any:
        """Remove the marks from all models and return the pipeline. This object serves no calls
        afterwards."""
        for cm in self.models.values():
            cm.detach()
        return self.pipe

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":
            raise AttributeError(name)
        value = getattr(self.pipe, name)
        if isinstance(value, MethodType) and loads_adapters(type(self.pipe), name):
            return partial(refuse, name, _LOADERS_REFUSED)
        return value

    def _refuse_replaced_models(self) -> None:
        for name, cm in self.models.items():
            if getattr(self.pipe, name, None) is not cm._orig_mod:
                raise ReplacedModuleError(
                    f"{name} of the {type(self.pipe).__name__} is another model than the "
                    f"{type(cm._orig_mod).__name__} that was compiled; put that back, or compile "
                    "the pipeline again"
                )

    def _check_known(self, names: Names) -> None:
        loaded = self.adapters
        adapter_names = (name for name in names if name is not None and name != BASE)
        for name in (member for mixture in adapter_names for member in members(mixture)):
            if name not in loaded:
                raise UnknownAdapterError(
                    f"there is no adapter {name!r}{nearest(name, loaded)}; loaded are "
                    f"{', '.join(loaded) or 'none'}"
                )


def _refuse_scales(arguments: Mapping[str, Any]) -> None:
    for name in _SCALING:
        value = arguments.get(name)
        if isinstance(value, Mapping) and value.get("scale", 1.0) != 1.0:
            raise ConfigError(
                f"{name}={{'scale': {value['scale']!r}}} scales adapters of diffusers, and "
                'there are none here; give weights, as in adapter_names=[{"ink": 0.5}]'
            )


def _with_parts(names: Names, loaded: Sequence[str]) -> Names:
    weights = (
        name.weights if isinstance(name, Mixture) else ((name or BASE, 1.0),) for name in names
    )
    return [named_sum({n: w for n, w in parts if n in loaded}) for parts in weights]


def _bind(pipe: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    signature = inspect.signature(type(pipe).__call__)
    return signature.bind_partial(None, *args, **kwargs).arguments


def _check_count_of_prompts(arguments: Mapping[str, Any], count: int) -> None:
    for name, value in arguments.items():
        if name == "prompt" and isinstance(value, str):
            entries = 1
        elif "prompt" in name and isinstance(value, (list, tuple, Tensor)):
            entries = len(value)
        else:
            continue  # any other string is for all prompts
        if entries != count:
            raise BatchError(
                f"adapter_names has {numbered(count, 'entry', 'entries')}, but {name} has "
                f"{entries}; give one name, or None for the base model, per prompt"
            )


def _forward_compiled(
    name: str,
    cm: CompiledModel,
    names: Names | None,
    rows: PromptRows | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    refuse_elsewhere(cm._session)
    if names is None:
        return _call_without_views(cm, None, args, kwargs)
    roles = cm.entry(cm._orig_mod).roles
    count = roles.rows(roles.bind(args, kwargs)) or 1
    title = f"{name} ({type(cm._orig_mod).__name__})"
    encodes = encodes_prompts(cm._orig_mod)
    owners: Sequence[int] | None = None
    if encodes and count == len(names):
        owners = range(count)
    elif rows is not None and not encodes:
        owners = rows.owners(title, (args, kwargs), count)
    elif len(set(names)) > 1:
        raise BatchError(
            f"{title} encodes {count} rows of {len(names)} prompts, and nothing says which prompt "
            "each belongs to; give lists of as many prompts and negative prompts, or call the "
            "pipeline once for each adapter"
        )
    by_row = [names[0]] * count if owners is None else [names[owner] for owner in owners]
    result = unfollowed(lambda _: _call_without_views(cm, by_row, args, kwargs))
    if rows is not None and owners is not None:
        rows.label_rows(result, tuple(owners))
    return result


def _call_without_views(
    cm: CompiledModel, names: Names | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call `cm` with each view replaced by a tensor over the same memory that is no view. Dynamo
    guards on the base of a view, so embeddings with and without one would need a graph each."""

    def without_base(value: Any) -> Any:
        return value.data if isinstance(value, Tensor) and value._is_view() else value

    named = {key: without_base(value) for key, value in kwargs.items()}
    # Not by its call: the model's own call has run the hooks.
    return cm.forward(*map(without_base, args), adapter_names=names, **named)


def _encode(forward: Callable[..., Any], rows: PromptRows, *args: Any, **kwargs: Any) -> Any:
    result = unfollowed(lambda _: forward(*args, **kwargs))
    rows.label_prompts(result)
    return result
