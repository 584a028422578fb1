"""transformers' `generate` over compiled forwards.

While it runs, the forwards of the parts that it calls directly are replaced by compiled ones:
encoders, also of images and videos (`get_image_features`), models inside the model with a
`generate` of their own, and any part if the model's class has its own `generate` (BLIP-2). If it
calls another part that adapters change, the marks there raise (lorafx.runtime.session).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from lorafx.eager.known_labels import KnownLabels
from lorafx.errors import CaptureError, LorafxError
from lorafx.generation.alora import generating_forward_of
from lorafx.libraries import MIXIN, class_of_library, is_of_library
from lorafx.model.replaced_methods import Replacement
from lorafx.model.targets import input_embedding
from lorafx.program.argument_roles import RoleTable
from lorafx.runtime.collection import collection_of_young
from lorafx.runtime.entry import Entry
from lorafx.runtime.forwards import CompiledForwards
from lorafx.runtime.resting import adapters_in_use, refuse_elsewhere
from lorafx.torch_internals.transforms import tracing

T = TypeVar("T")

#: Why `generate` with a paged cache is refused.
_PAGED = (
    "runs an engine that knows no adapters when generate() hands over to it; use the compiled "
    "model's generate_batch(prompts, adapter_names=[...])"
)
#: The step of `generate` that runs encoders.
_ENCODING = "_maybe_prepare_encoder_kwargs_for_generation"
#: transformers calls this to ask whether the model takes encoded images.
_ENCODES = "_supports_mm_encoder_outputs"


def refuse(name: str, why: str, *_: Any, **__: Any) -> NoReturn:
    """Raise CaptureError: `name` is a method that is not served."""
    raise CaptureError(
        f"{name}() {why}. To call it on the plain model, detach() first, or copy the model "
        "before it is compiled"
    )


class CompiledGenerate:
    """`generate` of one model."""

    def __init__(self, entries: CompiledForwards) -> None:
        self._entries = entries
        self._session = entries.session
        #: What is known of the operators of `generate` from earlier calls.
        self._remembered = KnownLabels()
        self._direct_forwards: dict[int, tuple[Entry, Callable[..., Any]]] = {}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate` with compiled forwards. Raises LorafxError if it has none."""
        model = self._entries.model
        run = getattr(model, "generate", None)
        if not callable(run):
            raise LorafxError(f"{type(model).__name__} has no generate(); call the model itself")
        attributes = [item for item in self._nested if item[:2] != (model, "generate")]
        replacing = self._session.replacements.replacing
        with collection_of_young():
            return replacing(attributes, self._generate, model, run, *args, **kwargs)

    def within(self, method: Callable[..., T]) -> Callable[..., T]:
        """`method` of the model, whose calls of `generate` are served by this class. Dynamo does
        not trace them."""
        return functools.partial(self._session.replacements.replacing, self._nested, method)

    @functools.cached_property
    def _nested(self) -> list[Replacement]:
        """`generate` of the model and of models inside it, for calls of them within a call; and
        `generate_batch`, which serves paged caches and is refused. Dynamo guards on the identity of
        these functions, so they are made once."""
        model, batching = self._entries.model, "generate_batch"
        refused: Replacement = (model, batching, functools.partial(refuse, batching, _PAGED))
        replaced: list[Replacement] = [refused] if hasattr(model, batching) else []
        return replaced + [
            (part, "generate", torch.compiler.disable(self._nested_generate(part)))
            for part in model.modules()
            if (part is model or is_of_library(part, *MIXIN))
            and callable(getattr(part, "generate", None))
        ]

    def _nested_generate(self, module: nn.Module) -> Callable[..., Any]:
        run, session = module.generate, self._session
        assert callable(run)

        @functools.wraps(run)
        def nested(*args: Any, **kwargs: Any) -> Any:
            from lorafx.eager.following import inner_call

            refuse_elsewhere(session)
            return inner_call(functools.partial(self._generate, module, run, *args, **kwargs))

        return nested

    def _generate(
        self, model: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        entries, session = self._entries, self._session
        kwargs.setdefault("disable_compile", True)
        # Before `replacing`: a compiled forward is made from the module's own one.
        forward = generating_forward_of(entries, model, run, args, kwargs)
        if model is entries.model:
            forward = entries.in_place(forward)
        attributes: list[Replacement] = [(model, "forward", forward)]
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
            if encoder is not model:
                attributes.append((encoder, "forward", entries.of(encoder)))
        attributes += self._parts(model) + _modalities(entries, model, kwargs)
        serve = functools.partial(session.replacements.replacing, attributes, run)
        requests, begins = session.requests, getattr(forward, "begins", None) or ()
        if requests.serve is None and requests.tokens is None:  # not inside of another `generate`
            names = tuple(requests.of_rows(len(begins))) if begins else requests.names
            uniform = (len(set(names)) == 1 and len(begins) < 2) or session.base.merged is not None
            requests = requests._replace(names=names[:1] if uniform else names, uniform=uniform)
            if not uniform:
                from lorafx.generation.prompt_rows import GeneratedRows

                roles = RoleTable(model, session.program.config.row_dims, run)
                known = str(inspect.unwrap(run).__module__).startswith("transformers.")
                watched = not known or kwargs.get("custom_generate") is not None
                rows = GeneratedRows(session, roles, len(names), self._remembered, watched=watched)
                requests = requests._replace(serve=rows.serve)
                serve = functools.partial(rows.run, serve)
        running = session.running._replace(requests=requests)
        return session.note(running, functools.partial(serve, *args, **kwargs))

    def _parts(self, model: nn.Module) -> list[Replacement]:
        """The parts of the model that a `generate` of its own class may call directly: children,
        and the embedding of the text, if an adapter of the call changes them. Models inside it with
        a `generate` are in `_nested`."""
        if not _overrides(model, "generate"):
            return []  # transformers' only calls what `_generate` replaces
        session = self._session
        paths = {path for name in adapters_in_use(session) for path in session.store[name].sites}
        changed = {id(site.module) for site in session.program.sites if site.path in paths}
        generating = {id(part) for part, _, _ in self._nested}
        base = getattr(model, "base_model", model)
        children = [*model.children(), *(base.children() if isinstance(base, nn.Module) else ())]
        if (embedding := input_embedding(model)) is not None:
            children.append(embedding)
        return [
            (part, "forward", self._direct_forward(part))
            for part in dict.fromkeys(children)
            if id(part) not in generating and any(id(inner) in changed for inner in part.modules())
        ]

    def _direct_forward(self, part: nn.Module) -> Callable[..., Any]:
        """The forward of a part of the model: compiled if `generate` calls it directly, unchanged
        inside of other calls. Dynamo guards on the function's identity, so it is cached."""
        entry, session = self._entries.of(part), self._session
        cached = self._direct_forwards.get(id(part))
        if cached is not None and cached[0] is entry:
            return cached[1]
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

        self._direct_forwards[id(part)] = entry, forward
        return forward


def _overrides(model: nn.Module, method: str) -> bool:
    """Whether the class of `model` has another `method` than transformers' GenerationMixin."""
    return getattr(type(model), method, None) is not getattr(class_of_library(*MIXIN), method, None)


def _modalities(
    entries: CompiledForwards, model: nn.Module, kwargs: Mapping[str, Any]
) -> list[Replacement]:
    """The methods by which `generate` encodes images and videos before the first forward. In a
    batch of several adapters with one image per prompt, the forward encodes them instead, since
    their owners are proved there; unless the model's class overrides `_ENCODING` (Florence-2, whose
    encoder takes images among the text)."""
    overridden = _overrides(model, _ENCODING)
    if not overridden and "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        return []  # the forward encodes them
    base = getattr(model, "base_model", None)
    names = [f"get_{modality}_features" for modality in ("image", "video")]
    named = [(name, getattr(base, name, None)) for name in names]
    methods = {name: method for name, method in named if isinstance(method, MethodType)}
    if not isinstance(base, nn.Module) or not methods:
        return []
    adapters = entries.session.requests.names
    taken = {name for method in methods.values() for name in inspect.signature(method).parameters}
    images = [value for name in taken if isinstance(value := kwargs.get(name), Tensor)]
    by_prompt = all(image.dim() > 0 and len(image) == len(adapters) for image in images)
    if len(set(adapters)) > 1 and by_prompt and hasattr(model, _ENCODES) and not overridden:
        return [(model, _ENCODES, bool)]
    return [(base, name, entries.of(base, method=method)) for name, method in methods.items()]
