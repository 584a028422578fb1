"""diffusers' conversions of the names of a model's first implementation, and what they leave out.

saved tensors ─▶ a loader's `lora_state_dict` ─▶ tensors and α under diffusers' names
    └─ which of them each operation reads ─▶ those that no result was made of
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, get_args, get_type_hints

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lorafx.torch_internals.graph_parts import tree_leaves


class Conversion(NamedTuple):
    """What a loader makes of a file: `values` by diffusers' keys, and the keys of the file whose
    tensors are `lost`, none of which is an α."""

    loader: str
    values: dict[str, Tensor | float]
    lost: tuple[str, ...]


def conversions(tensors: Mapping[str, Tensor], model: nn.Module) -> Iterator[Conversion]:
    """What the loaders of pipelines with a model of this class make of `tensors`. Conversions that
    fail, or that change no name, are left out."""
    config = getattr(model, "config", None)  # a UNet's decides the numbers of blocks
    blocks = config if hasattr(config, "layers_per_block") else None
    for name, loader in _loaders():
        if not _loads_into(loader, model):
            continue
        sources = {key: tensor.clone() for key, tensor in tensors.items()}  # some scale in place
        try:
            with _silence(), _Following(sources) as following:
                result = loader.lora_state_dict(dict(sources), unet_config=blocks)
            converted, *more = result if isinstance(result, tuple) else (result,)
            alphas = {key: float(value) for key, value in (more[0] if more else {}).items()}
            arrived = following.sources(list(converted.values()))
        except Exception:  # conversions for other models may raise any exception
            continue
        lost = (key for key in tensors.keys() - arrived if not key.endswith("alpha"))
        if converted.keys() != tensors.keys():
            yield Conversion(name, {**converted, **alphas}, tuple(sorted(lost)))


def _loaders() -> Iterator[tuple[str, Any]]:
    try:
        pipelines: Any = importlib.import_module("diffusers.loaders.lora_pipeline")
    except ImportError:
        return
    seen: set[Any] = set()
    for name, loader in vars(pipelines).items():
        conversion = isinstance(loader, type) and vars(loader).get("lora_state_dict")
        if conversion and conversion not in seen:
            seen.add(conversion)
            yield name, loader


def _loads_into(loader: type, model: nn.Module) -> bool:
    """Whether a pipeline with this loader is made of a model of this class, or none says what it is
    made of. Names alone do not tell one family from another."""
    conversion, pipelines = vars(loader)["lora_state_dict"], _pipelines()
    own = [p for p in pipelines if inspect.getattr_static(p, "lora_state_dict", None) is conversion]
    made = any(isinstance(model, tuple(pipelines[pipeline])) for pipeline in own or pipelines)
    return made if own else not made


@cache
def _pipelines() -> Mapping[type, Collection[type]]:
    """All pipelines of diffusers, with the classes of their models."""
    package: Any = importlib.import_module("diffusers.pipelines")
    found: dict[type, Collection[type]] = {}
    for name in dir(package):
        try:
            with _silence():
                pipeline = getattr(package, name)
            hints = get_type_hints(pipeline.__init__) if isinstance(pipeline, type) else {}
        except Exception:  # what a pipeline imports may be absent
            continue
        types = [kind for hint in hints.values() for kind in (hint, *get_args(hint))]
        models = [kind for kind in types if isinstance(kind, type) and issubclass(kind, nn.Module)]
        if models:
            found[pipeline] = models
    return found


@contextmanager
def _silence() -> Iterator[None]:
    logs = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


class _Following(TorchFunctionMode):
    """Notes of which `sources` each tensor in the block is made."""

    def __init__(self, sources: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._keys: Any = WeakTensorKeyDictionary()
        for key, tensor in sources.items():
            self._keys[tensor] = frozenset([key])

    def sources(self, tensors: Any) -> frozenset[str]:
        """The keys of the sources of these, at any depth of tuples and dicts."""
        leaves = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
        return frozenset().union(*(self._keys.get(leaf, ()) for leaf in leaves))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        keys = self.sources((args, kwargs))
        written = args[0] if result is None and args else result
        for leaf in tree_leaves(written) if keys else ():
            for tensor in (leaf, leaf._base) if isinstance(leaf, Tensor) else ():
                if tensor is not None:  # what a written tensor is a view of is written, too
                    self._keys[tensor] = self._keys.get(tensor, frozenset()) | keys
        return result
