"""Files whose names are of the tables in `spelling`, in PEFT's names.

    file ─▶ parts ─▶ the component that the model is ─▶ modules by the model's names, with s = α/r
                                                     └▶ by diffusers' conversion, if it lacks them

α is that of the configuration, or of a tensor `….alpha`. A diffusion model's file without either
means α = r; another file is refused. Names of a model's first implementation are read by the
conversion of diffusers whose factors all belong to modules.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lorafx.adapter_store.dialects import loaders
from lorafx.adapter_store.dialects.module_paths import ModulePaths
from lorafx.adapter_store.dialects.spelling import DENOISERS, NamedTensor, Scales, spelt
from lorafx.adapter_store.field_checks import json_object
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import factor_sizes
from lorafx.adapter_store.problems import finite_number
from lorafx.adapter_store.saved import AdapterState, Made, Saved
from lorafx.errors import CheckpointError, UnsupportedAdapterError, nearest, some
from lorafx.model.module_graph import join
from lorafx.progress import LOG
from lorafx.registry import lookup

#: Leaves that only files of pipelines have.
_OF_PIPELINES = {"kohya", "diffusers"}
_METADATA = "lora_adapter_metadata"


def parts_of(saved: Saved, dialect: str | None = None) -> list[NamedTensor]:
    """The tensors by component and module. Prefixes with dots are those of components if there is
    no configuration of PEFT's, if a leaf is another than PEFT's, or if `dialect` says so."""
    parts = [spelt(key, tensor) for key, tensor in saved.tensors.items()]
    dotted = dialect in ("diffusers", "kohya")
    if dialect is None:
        dotted = saved.fields is None or _METADATA in saved.metadata
        dotted = dotted or any(part.leaf in _OF_PIPELINES for part in parts)
    return parts if dotted else [spelt(part.key, part.tensor, dotted=False) for part in parts]


def _dialect_of(parts: Sequence[NamedTensor], denoiser: bool) -> str:
    leaves = {part.leaf for part in parts}
    if "kohya" in leaves or any(part.flat for part in parts):
        return "kohya"
    if denoiser or "diffusers" in leaves or any(part.component for part in parts):
        return "diffusers"
    return "loralib" if "loralib" in leaves else "peft"


def state(
    saved: Saved, parts: Sequence[NamedTensor], model: nn.Module | None, dialect: str | None
) -> AdapterState:
    """`parts` of `saved` in PEFT's names. Raises CheckpointError for names and scales that are not
    certain, UnsupportedAdapterError for what diffusers' conversion leaves out."""
    names = None if model is None else ModulePaths(model)
    denoiser = model is not None and _is_of_diffusers(model)
    if denoiser and names is not None and not names.has("model"):
        parts = [part._replace(module=part.module.removeprefix("model.")) for part in parts]
    plain = not any(part.component or part.flat or part.leaf for part in parts)
    if plain and saved.fields is not None:
        config = PeftConfig.read(saved.fields, where=f"the configuration of {saved.where}")
        return AdapterState(config, saved.tensors, saved.where, made=saved.made)
    dialect = dialect or _dialect_of(parts, denoiser)
    scales = _scales(saved, parts, denoiser, names is None)
    factors = [part for part in parts if part.letter != "alpha"]
    assemble = partial(assembled, saved, dialect, names=names)
    direct = assemble(factors, scales)
    if names is None or not names.lost(direct):
        return direct
    if denoiser:
        direct = loaders.converted(factors, scales, model, names, direct, assemble)
    if not names.lost(direct):
        return direct
    here = [part for part in factors if part.flat and part.component not in direct.left_out]
    here = [part for part in here if names.path(part.module, flat=True) == part.module]
    if unknown := list(dict.fromkeys(p.module for p in here if not names.has(p.module))):
        lines = "; ".join(f"{n}{nearest(n, list(names.flat)[:1000], 1)}" for n in unknown[:3])
        raise CheckpointError(
            f"{saved.where} ({dialect}): {len(unknown)} of its names are of no module of this "
            f"model, and diffusers, where it is installed, has no conversion for it: {lines}"
        )
    return direct


def _is_of_diffusers(model: nn.Module) -> bool:
    diffusers: Any = sys.modules.get("diffusers")
    return diffusers is not None and isinstance(model, diffusers.ModelMixin)


def _scales(saved: Saved, parts: Sequence[NamedTensor], denoiser: bool, anywhere: bool) -> Scales:
    """s of each place with factors; None where a configuration has it, or α is r. `anywhere`: for
    no model in particular."""
    alphas = {
        part.place: _alpha_of(f"{saved.where}: {part.key}", part.tensor)
        for part in parts
        if part.letter == "alpha"
    }
    scales: dict[str, float | None] = {}
    pairs = {f"{p.place}.lora_{p.letter}": p.tensor for p in parts if p.letter in ("A", "B")}
    for place, sizes in factor_sizes(pairs).items():
        alpha = alphas.pop(place, None) if sizes.rank else None
        scales[place] = None if alpha is None else alpha / sizes.rank
    if alphas:
        raise CheckpointError(
            f"{saved.where} has α for {some(p.lstrip(':') for p in alphas)}, and no factors there"
        )
    if None not in scales.values() or saved.fields is not None or _METADATA in saved.metadata:
        return scales
    leaves = {part.leaf for part in parts} if anywhere else set()
    if not (denoiser or leaves & _OF_PIPELINES or any(p.component or p.flat for p in parts)):
        raise CheckpointError(
            f"{saved.where} has no configuration, and without α (lora_alpha) the scale of its "
            "factors is not known; give AdapterSource(..., config={'r': ..., 'lora_alpha': "
            "...}), or the folder with its adapter_config.json"
        )
    LOG.info("adapter in %s: α is r, as in diffusers, where the file has none", saved.where)
    return scales


def assembled(
    saved: Saved,
    dialect: str,
    parts: Sequence[NamedTensor],
    scales: Scales,
    names: ModulePaths | None,
) -> AdapterState:
    """The parts of the component that the model is, or of all of a pipeline, by PEFT's names."""
    groups: dict[str, list[NamedTensor]] = {}
    for part in parts:
        groups.setdefault(part.component, []).append(part)
    component = None
    if names is not None and groups and not _is_whole_pipeline(saved, names, groups, scales):
        component = _component(saved, groups, names)
    left_out = () if component is None else tuple(sorted(groups.keys() - {component}))
    config = _config(saved, component or "")
    tensors: dict[str, Tensor] = {}
    scale_of: dict[str, float] = {}
    made: dict[str, Made] = {}
    chosen = parts if component is None else groups[component]
    for part in chosen:
        name = join(part.component, part.module) if component is None else part.module
        path = names.path(name, part.flat) if names and part.letter else name
        key, tensor = _peft(saved, part, path, None if names is None else names.module(path))
        if key in tensors:
            raise CheckpointError(f"{saved.where} has two keys that mean {key}; keep one")
        tensors[key] = tensor
        if part.key in saved.made:
            made[key] = saved.made[part.key]
        scale = scales.get(part.place)
        if part.letter and (scale is not None or config is None):
            scale_of[path] = 1.0 if scale is None else scale
    if any(part.leaf == "loralib" for part in parts):
        _refuse_slices(saved, tensors)
    if config is None:
        letters = {part.letter for part in chosen}
        config = PeftConfig(use_dora="m" in letters, lora_bias="b" in letters)
        ends = [key.removesuffix("weight") for key in tensors if key.endswith(".lora_B.weight")]
        for end in ends if "b" in letters else ():  # of modules without a bias it is 0
            b = tensors[f"{end}weight"]
            tensors.setdefault(f"{end}bias", b.new_zeros(b.shape[:1]))
    where = f"{saved.where} ({dialect})"
    return AdapterState(config, tensors, where, scale_of, dialect, left_out, made=made)


def _peft(
    saved: Saved, part: NamedTensor, path: str, module: nn.Module | None
) -> tuple[str, Tensor]:
    """A part by PEFT's key, in the dimensions of the weight of `module`."""
    tensor, entry = part.tensor, None if module is None else lookup(module)
    if not part.letter:
        return path, tensor
    if part.leaf == "dora" and tensor.dim() > 1 and tensor.numel() != len(tensor):
        raise UnsupportedAdapterError(
            f"{saved.where}: {part.key} has shape {tuple(tensor.shape)}, a scale for each "
            "input; DoRA here scales outputs (train with wd_on_output), or merge it into a "
            "copy of the base model"
        )
    if part.letter == "m":
        return join(path, "lora_magnitude_vector"), tensor.flatten()
    if part.letter == "b":
        return join(path, "lora_B.bias"), tensor
    if part.letter == "W":
        return join(path, "lora_W.weight"), tensor
    if part.embedding or (entry is not None and entry.kind == "embedding"):
        return join(path, f"lora_embedding_{part.letter}"), tensor
    weight = getattr(module, "weight", None)
    dims = weight.dim() if isinstance(weight, Tensor) else 0
    is_conv = entry is not None and entry.kind == "conv"
    if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and dims == 2:
        tensor = tensor[..., 0, 0]  # trained on a 1×1 convolution, which is a linear here
    elif tensor.dim() == 2 and isinstance(weight, Tensor) and (is_conv or dims == 4):
        if part.letter == "A" and tensor.shape[1] == math.prod(weight.shape[1:]):
            tensor = tensor.unflatten(1, weight.shape[1:])  # with the kernels as columns
        else:
            tensor = tensor.reshape(*tensor.shape, *[1] * (dims - 2))
    return join(path, f"lora_{part.letter}.weight"), tensor


def _refuse_slices(saved: Saved, tensors: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedAdapterError for factors (G·r, K) and (N, r) of loralib's MergedLinear."""
    for path, (_, _, rank) in factor_sizes(tensors).items():
        b = tensors.get(join(path, "lora_B.weight"))
        columns = b.shape[1] if b is not None and b.dim() > 1 else 0
        if rank > columns > 0 and rank % columns == 0:
            raise UnsupportedAdapterError(
                f"{saved.where}: {path} has factors of {rank // columns} slices, as loralib's "
                "MergedLinear saves them; save a lora_B with the slices' own on its diagonal, "
                f"(N, {rank}), and lora_alpha times {rank // columns}"
            )


def _config(saved: Saved, component: str) -> PeftConfig | None:
    if saved.fields is not None:
        return PeftConfig.read(saved.fields, where=f"the configuration of {saved.where}")
    if _METADATA not in saved.metadata:
        return None
    where = f"{_METADATA} in the metadata of {saved.where}"
    fields = json_object(saved.metadata[_METADATA], where)
    prefix = f"{component}." if component else ""
    chosen = {key.removeprefix(prefix): v for key, v in fields.items() if key.startswith(prefix)}
    return PeftConfig.read(chosen, where=where) if chosen else None


def _is_whole_pipeline(
    saved: Saved,
    names: ModulePaths,
    groups: Mapping[str, Sequence[NamedTensor]],
    scales: Mapping[str, Any],
) -> bool:
    """Whether the model has the file's components as children; α = r is not implied then."""
    if saved.component is not None:
        return False
    for part in groups[next(iter(groups))][:1] if len(groups) == 1 else ():
        known = saved.fields is not None or _METADATA in saved.metadata
        known = known or any(scale is not None for scale in scales.values())
        if not known and part.component and names.has(f"{part.component}.{part.module}"):
            raise CheckpointError(
                f"{saved.where} has no configuration, and {part.component!r} is a module of this "
                "model: it may be PEFT's file without adapter_config.json, or a pipeline's, whose "
                "α is r. Give AdapterSource(..., config={'r': ..., 'lora_alpha': ...})"
            )
    return all(map(names.has, groups)) or not any(groups)


def _component(
    saved: Saved, groups: Mapping[str, Sequence[NamedTensor]], names: ModulePaths
) -> str | None:
    """The component that the model is: `saved.component`, a denoiser by any of its names, the only
    one, or the one whose paths the model has. Raises CheckpointError if several fit, or if the file
    lacks `saved.component`."""
    chosen = saved.component
    if chosen in DENOISERS and chosen not in groups:
        others = [name for name in groups if name in (*DENOISERS, "")]
        chosen = others[0] if len(others) == 1 else chosen
    if chosen is not None and chosen not in groups:
        raise CheckpointError(
            f"{saved.where} has no factors for the component {chosen!r}; it has some for "
            f"{', '.join(sorted(groups))}"
        )
    if chosen is not None or len(groups) == 1:
        return chosen if chosen is not None else next(iter(groups))
    exists = {
        name: [names.has(names.path(part.module, part.flat)) for part in parts if part.letter]
        for name, parts in groups.items()
    }
    fitting = [name for name in exists if any(exists[name])]
    complete = [name for name in fitting if all(exists[name])]
    fitting = complete if len(complete) == 1 else fitting
    if len(fitting) > 1:
        raise CheckpointError(
            f"{saved.where} has factors for {' and '.join(fitting)}, which both fit this model; "
            f"say which by AdapterSource(..., component={fitting[0]!r})"
        )
    return fitting[0] if fitting else None


def _alpha_of(key: str, tensor: Tensor) -> float:
    """α from the tensor `key`; CheckpointError unless it is one finite number."""
    if (value := finite_number(tensor)) is None:
        raise CheckpointError(
            f"{key} must be one finite number, it has shape {tuple(tensor.shape)} and dtype "
            f"{tensor.dtype}"
        )
    return value
