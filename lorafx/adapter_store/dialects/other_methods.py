"""Keys of methods that are no LoRA: refused by the name of the method, with the way out."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

from lorafx.adapter_store.saved import Saved
from lorafx.errors import UnsupportedAdapterError

_MERGE = "merge it into a copy of the base model by the library that trained it, or convert it"

#: The last parts of a key, and the method that has them.
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
    r"lora_router.*|internal_xlora_classifier.*": (
        "a mixture of adapters with a router of its own (X-LoRA, Arrow, Poly)"
    ),
    r"module_logits|poly_lora_[AB](\..+)?": "Poly: a mixture of skills",
}
_PATTERNS = [(re.compile(rf"(?:.*\.)?(?:{keys})"), method) for keys, method in _METHODS.items()]


#: Of each module GLoRA has all of these. One alone is the weight of a module of that name.
_GLORA = re.compile(r"((?:.*\.)?)[ab][12]\.weight")
_OF_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


def refuse_other_methods(saved: Saved) -> None:
    """Raise UnsupportedAdapterError where keys belong to methods other than LoRA."""
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
            f"{_MERGE}"
        )


def _method(key: str, keys: Container[str]) -> str | None:
    for pattern, method in _PATTERNS:
        if pattern.fullmatch(key):
            return method
    part = _GLORA.fullmatch(key)
    return "GLoRA" if part and all(part[1] + own in keys for own in _OF_GLORA) else None
