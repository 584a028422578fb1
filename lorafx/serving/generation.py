"""transformers' `generate` over compiled forwards.

While it runs, the parts of the model that it calls directly are replaced by their compiled
versions: encoders, also of images and videos (`get_image_features`), models inside the model with a
`generate` of their own, and where the model has its own `generate` (BLIP-2) any part. The marks of
other parts raise where adapters change them (lorafx.session.resting).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from lorafx.errors import LorafxError
from lorafx.serving.added_tokens import without_added_tokens
from lorafx.serving.alora import generating_forward_of
from lorafx.serving.entries import CompiledForwards
from lorafx.serving.entry import Entry
from lorafx.serving.names import PAGED, refuse
from lorafx.session.resting import refuse_elsewhere, wanted
from lorafx.session.stand_ins import Replaced
from lorafx.torch_internals.compat import tracing

T = TypeVar("T")

#: The step of `generate` that runs encoders.
_ENCODING = "_maybe_prepare_encoder_kwargs_for_generation"
#: By this transformers asks whether the model takes images that are encoded already.
_ENCODES = "_supports_mm_encoder_outputs"


class CompiledGenerate:
    """`generate` of one model."""

    def __init__(self, entries: CompiledForwards) -> None:
        self._entries = entries
        self._session = entries.session
        self._by_themselves: dict[int, tuple[Entry, Callable[..., Any]]] = {}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate` with its forwards compiled; LorafxError where it has none."""
        model = self._entries.model
        run = getattr(model, "generate", None)
        if not callable(run):
            raise LorafxError(f"{type(model).__name__} has no generate(); call the model itself")
        parts = [item for item in self._nested if item[0] is not model]
        attributes = [*parts, *_batching(model)]
        replacing = self._session.stand_ins.replacing
        return replacing(attributes, self._generate, model, run, *args, **kwargs)

    def within(self, method: Callable[..., T]) -> Callable[..., T]:
        """`method` of the model: where it calls `generate`, it is this one. Dynamo leaves it to
        Python."""
        attributes = [*self._nested, *_batching(self._entries.model)]
        return functools.partial(self._session.stand_ins.replacing, attributes, method)

    @functools.cached_property
    def _nested(self) -> list[Replaced]:
        """The `generate` of the model, and of models inside of it, for calls of them within a call.
        Made once: Dynamo guards on the very function."""
        mixin, model = _mixin(), self._entries.model
        return [
            (part, "generate", torch.compiler.disable(self._nested_in(part)))
            for part in model.modules()
            if (part is model or isinstance(part, mixin))
            and callable(getattr(part, "generate", None))
        ]

    def _nested_in(self, module: nn.Module) -> Callable[..., Any]:
        run, session = module.generate, self._session
        assert callable(run)

        @functools.wraps(run)
        def nested(*args: Any, **kwargs: Any) -> Any:
            refuse_elsewhere(session)
            repeating = session.running._replace(requests=session.asked._replace(repeats=True))
            action = functools.partial(self._generate, module, run, *args, **kwargs)
            return session.note(repeating, action)

        return nested

    def _generate(
        self, model: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        entries, session = self._entries, self._session
        kwargs.setdefault("disable_compile", True)
        if model is entries.model:
            args, kwargs = without_added_tokens(session, args, kwargs)
        # CompiledForwards first: each reads the module's own forward when it is made.
        forward = generating_forward_of(entries, model, run, args, kwargs)
        encoders = [(part, "forward", entries.of(part)) for part in _encoders(model)]
        forwards: list[Replaced] = [(model, "forward", forward), *encoders, *self._parts(model)]
        attributes = [*forwards, *_modalities(entries, model, kwargs)]
        return session.stand_ins.replacing(attributes, run, *args, **kwargs)

    def _parts(self, model: nn.Module) -> list[Replaced]:
        """The parts of the model that a `generate` of its own class may call by themselves, as far
        as the adapters of the call change them: children, and the embedding of the text. Models
        inside of it have their own `generate`."""
        if not _overrides(model, "generate"):
            return []  # it calls what `_generate` knows
        session = self._session
        paths = {path for name in wanted(session) for path in session.store[name].sites}
        changed = {id(site.module) for site in session.program.sites if site.path in paths}
        generating = {id(part) for part, _, _ in self._nested}
        base = getattr(model, "base_model", model)
        children = [*model.children(), *(base.children() if isinstance(base, nn.Module) else ())]
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if isinstance(embedding, nn.Module):
            children.append(embedding)
        return [
            (part, "forward", self._by_itself(part))
            for part in dict.fromkeys(children)
            if id(part) not in generating and any(id(inner) in changed for inner in part.modules())
        ]

    def _by_itself(self, part: nn.Module) -> Callable[..., Any]:
        """The forward of a part of the model: compiled, but inside of other calls what it was.
        Dynamo guards on the very function."""
        entry, session = self._entries.of(part), self._session
        known = self._by_themselves.get(id(part))
        if known is not None and known[0] is entry:
            return known[1]
        function = entry.function
        site = next((site for site in session.program.sites if site.module is part), None)

        @functools.wraps(function)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if tracing() or session.running.entries:
                return function(*args, **kwargs)
            output = entry(*args, **kwargs)
            if site is not None:
                session.returned_from = site.path
            return output

        self._by_themselves[id(part)] = entry, forward
        return forward


def _batching(model: nn.Module) -> list[Replaced]:
    """`generate` hands paged caches over to continuous batching, which is refused."""
    name = "generate_batch"
    refusing = functools.partial(refuse, name, PAGED)
    return [(model, name, refusing)] if hasattr(model, name) else []


def _encoders(model: nn.Module) -> list[nn.Module]:
    """The encoder that `generate` runs by itself, for encoder-decoder models."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    get_encoder: Callable[[], nn.Module] = getattr(model, "get_encoder")  # noqa: B009
    encoder = get_encoder()
    return [] if encoder is model else [encoder]


def _mixin() -> Any:
    """transformers' GenerationMixin; an empty tuple where it is not imported."""
    return getattr(sys.modules.get("transformers.generation.utils"), "GenerationMixin", ())


def _overrides(model: nn.Module, method: str) -> bool:
    """Whether the class of `model` has another `method` than transformers' GenerationMixin."""
    return getattr(type(model), method, None) is not getattr(_mixin(), method, None)


def _modalities(
    entries: CompiledForwards, model: nn.Module, given: Mapping[str, Any]
) -> list[Replaced]:
    """The methods that `generate` has images and videos encoded by, before the first forward. In a
    batch of several adapters whose images come one entry a prompt, the forward encodes them
    instead: there it is proved whose they are. An `_ENCODING` of the model's own has them encoded
    in any case (Florence-2's encoder takes them among the text)."""
    overridden = _overrides(model, _ENCODING)
    if not overridden and "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return []  # the forward encodes them
    base = getattr(model, "base_model", None)
    names = [f"get_{modality}_features" for modality in ("image", "video")]
    found = [(name, getattr(base, name, None)) for name in names]
    methods = {name: method for name, method in found if isinstance(method, MethodType)}
    if not isinstance(base, nn.Module) or not methods:
        return []
    adapters = entries.session.asked.names
    taken = {name for method in methods.values() for name in inspect.signature(method).parameters}
    images = [value for name in taken if isinstance(value := given.get(name), torch.Tensor)]
    by_prompt = all(image.dim() > 0 and len(image) == len(adapters) for image in images)
    if len(set(adapters)) > 1 and by_prompt and hasattr(model, _ENCODES) and not overridden:
        return [(model, _ENCODES, bool)]
    return [(base, name, entries.of(base, method=method)) for name, method in methods.items()]
