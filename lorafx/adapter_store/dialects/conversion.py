"""diffusers' own conversions of adapters (diffusers.loaders), where diffusers is installed.

Nothing of its tables is repeated here. Which of its pipelines' conversions is right for a model is
seen from the result: every factor has to land on a module.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.errors import CheckpointError, UnsupportedAdapterError

#: Of adapters for the largest models. Conversions look through all keys, some for each of them.
_MOST_KEYS = 20_000
#: Tensors by diffusers' names, and α by them.
Converted = tuple[dict[str, Tensor], dict[str, float]]


def peft_keys(tensors: Mapping[str, Any], component: str) -> dict[str, Any]:
    """`tensors` of one component, with diffusers' older keys replaced by `lora_A` and `lora_B`.

    Raises:
        CheckpointError: diffusers is not installed, or cannot read them.
    """
    try:
        utils: Any = importlib.import_module("diffusers.utils")
    except ImportError:
        first = next(iter(tensors), "")
        raise CheckpointError(
            f"{first!r} is an older key of diffusers, which its own conversion reads: pip install "
            "'lorafx[diffusers]'"
        ) from None
    try:
        if component.startswith("text_encoder"):
            old = utils.convert_state_dict_to_diffusers(dict(tensors))
            found: dict[str, Any] = utils.convert_state_dict_to_peft(old)
        else:
            found = utils.convert_unet_state_dict_to_peft(dict(tensors))
    except Exception as error:
        raise CheckpointError(
            f"diffusers cannot read the keys for {component or 'this model'} "
            f"({next(iter(tensors))!r:.200}, ...): {error!s:.200}"
        ) from error
    if len(found) < len(tensors):
        raise CheckpointError(
            f"{len(tensors)} keys for {component or 'this model'} have {len(found)} meanings "
            f"({next(iter(tensors))!r:.200}, ...); keep one of each"
        )
    return found


def converted(
    tensors: Mapping[str, Tensor], model: nn.Module, lands: Callable[[Converted], bool]
) -> Converted | None:
    """What diffusers makes of `tensors` for this model: the one conversion whose factors all land.
    None where there is none, or no diffusers.

    Raises:
        CheckpointError: conversions land that differ.
        UnsupportedAdapterError: diffusers would leave something out.
    """
    found: dict[str, Converted] = {}
    if len(tensors) > _MOST_KEYS:
        return None
    for name, loader in _loaders():
        try:
            with _silence():
                made = _result(loader.lora_state_dict(dict(tensors), unet_config=_config(model)))
        except Exception:  # one that is for other models: each fails in its own way
            continue
        if made is None or made[0].keys() == tensors.keys() or not lands(made):
            continue
        if not any(_equal(made, other) for other in found.values()):
            found[name] = made
    if len(found) > 1:
        raise CheckpointError(
            f"diffusers converts these names in different ways for this model ({', '.join(found)});"
            " convert the adapter by the pipeline that it is for, and save it again"
        )
    dora = next((key for key in tensors if "dora_scale" in key), None)
    if found and dora is not None:
        raise UnsupportedAdapterError(
            f"{dora} belongs to DoRA, which diffusers' conversion of these names leaves out; save "
            "the adapter under the names that diffusers has for the model"
        )
    return next(iter(found.values()), None)


@contextmanager
def _silence() -> Iterator[None]:
    """Without diffusers' warnings about keys that are for another conversion."""
    log = logging.getLogger("diffusers")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _loaders() -> Iterator[tuple[str, Any]]:
    try:
        pipelines: Any = importlib.import_module("diffusers.loaders.lora_pipeline")
    except ImportError:
        return
    seen: set[Any] = set()
    for name, loader in vars(pipelines).items():
        own = isinstance(loader, type) and vars(loader).get("lora_state_dict")
        if own and own not in seen:
            seen.add(own)
            yield name, loader


def _config(model: nn.Module) -> Any:
    """A UNet's configuration, by which names of blocks are counted."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "layers_per_block") else None


def _result(made: Any) -> Converted | None:
    parts = made if isinstance(made, tuple) else (made,)
    tensors, alphas = parts[0], parts[1] if len(parts) > 1 else None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        return None
    return tensors, {key: float(value) for key, value in (alphas or {}).items()}


def _equal(first: Converted, second: Converted) -> bool:
    return (
        first[1] == second[1]
        and first[0].keys() == second[0].keys()
        and all(torch.equal(tensor, second[0][key]) for key, tensor in first[0].items())
    )
