"""All dialects, and the detection of a file's."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from typing import NamedTuple

from torch import nn

from lorafx.adapter_store.dialects import diffusers, kohya, loralib, mlx
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_keys import parse
from lorafx.adapter_store.saved import AdapterState, Saved
from lorafx.errors import CheckpointError, ConfigError, UnsupportedAdapterError, nearest


class Dialect(NamedTuple):
    """A way to save adapters.

    Attributes:
        name: in `AdapterSource.dialect`.
        keys: an example in messages.
        claims: whether the keys of a file are of this dialect.
        state: a file in PEFT's names, with views of its tensors; unknown keys are left for the
            reader to refuse. Raises CheckpointError and UnsupportedAdapterError.
        components: the models of a pipeline with factors in a file; "" where the keys name none.
    """

    name: str
    keys: str
    claims: Callable[[Saved], bool]
    state: Callable[[Saved, nn.Module | None], AdapterState]
    components: Callable[[Saved], tuple[str, ...]] = lambda _: ("",)


def _is_peft(saved: Saved) -> bool:
    return any(parse(key) is not None for key in saved.tensors)


def _peft(saved: Saved, _: nn.Module | None) -> AdapterState:
    if saved.fields is None:
        raise CheckpointError(
            f"{saved.where} has no configuration, and without α (lora_alpha) the scale of its "
            "factors is not known; give AdapterSource(..., config={'r': ..., 'lora_alpha': "
            "...}), or the folder with its adapter_config.json"
        )
    config = PeftConfig.read(saved.fields, where=f"the configuration of {saved.where}")
    return AdapterState(config, saved.tensors, saved.where)


#: The first claimant reads a file.
DIALECTS = (
    Dialect("mlx", mlx.KEYS, mlx.claims, mlx.state),
    Dialect("kohya", kohya.KEYS, kohya.claims, kohya.state, kohya.components),
    Dialect("diffusers", diffusers.KEYS, diffusers.claims, diffusers.state, diffusers.components),
    Dialect("loralib", loralib.KEYS, loralib.claims, loralib.state),
    Dialect("peft", "<module>.lora_A.weight", _is_peft, _peft),
)

#: Last parts of keys -> the other method that has them.
_METHODS: Mapping[str, str] = {
    r"hada_[wt][12](_[ab])?": "LoHa: a product of two low-rank matrices, element by element",
    r"lokr_[wt][12](_[ab])?": "LoKr: a Kronecker product",
    r"oft_(blocks|diag|[rRlL])(\.weight)?": "OFT: rotations of the base weight",
    r"boft_[A-Za-z]+": "BOFT: rotations of the base weight",
    r"ia3_l(\..+)?": "IA³: scales of activations",
    r"vera_lambda_[bd]|vera_[AB](\..+)?": "VeRA: scales between random matrices that all share",
    r"on_input|w_norm|b_norm": "a trained scale or norm of LyCORIS",
    r"diff(_b)?": "a whole difference of weights",
    r"lora_mid\.weight|lora_t[12]": "a Tucker decomposition (lora_mid)",
    r"lora_E(\..+)?|ranknum(\..+)?": "AdaLoRA: factors with singular values between them",
    r"lora_router.*|internal_xlora_classifier.*": "a router of its own (X-LoRA, Arrow, Poly)",
    r"module_logits|poly_lora_[AB](\..+)?": "Poly: a mixture of skills",
}
_PATTERNS = [(re.compile(rf"(?:.*\.)?(?:{keys})"), method) for keys, method in _METHODS.items()]
#: A GLoRA module has all of these; a single one is the weight of a module of that name.
_GLORA = re.compile(r"((?:.*\.)?)[ab][12]\.weight")
_OF_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


def dialect_of(saved: Saved, name: str | None = None) -> Dialect:
    """The dialect `name`, or that of `saved`. Raises ConfigError for an unknown name,
    UnsupportedAdapterError for keys of another method, CheckpointError for unknown keys."""
    known = {dialect.name: dialect for dialect in DIALECTS}
    if name is not None:
        if name not in known:
            raise ConfigError(
                f"there is no dialect {name!r}{nearest(str(name), known)}; dialects are "
                f"{', '.join(known)}"
            )
        return known[name]
    if isinstance(saved.fields, PeftConfig):
        return known["peft"]
    _refuse_other_methods(saved)
    for dialect in DIALECTS:
        if dialect.claims(saved):
            return dialect
    if saved.fields is not None:
        return known["peft"]  # its errors name each key
    first = ", ".join(repr(key[:100]) for key in list(saved.tensors)[:3]) or "no tensors"
    expected = "; ".join(f"{dialect.name}: {dialect.keys}" for dialect in DIALECTS)
    raise CheckpointError(
        f"{saved.where} has keys of no known dialect ({first}). Dialects are {expected}"
    )


def _refuse_other_methods(saved: Saved) -> None:
    found: dict[str, list[str]] = {}
    for key in saved.tensors:
        method = _method(key, saved.tensors)
        if method is not None:
            found.setdefault(method, []).append(key)
    if found:
        lines = "\n".join(
            f"  - {method}: {len(keys)} keys, such as {keys[0][:200]!r}"
            for method, keys in found.items()
        )
        raise UnsupportedAdapterError(
            f"{saved.where} holds what is no LoRA:\n{lines}\nlorafx serves sums of s·B A alone; "
            "merge it into a copy of the base model by the library that trained it, or convert it"
        )


def _method(key: str, keys: Container[str]) -> str | None:
    for pattern, method in _PATTERNS:
        if pattern.fullmatch(key):
            return method
    part = _GLORA.fullmatch(key)
    return "GLoRA" if part and all(part[1] + name in keys for name in _OF_GLORA) else None
