"""What PEFT's other methods are, and the way out: for messages."""

from __future__ import annotations

from collections.abc import Mapping

MERGE = "merge it into a copy of the base model (`PeftModel.merge_and_unload()`) instead"
_PROMPT = "it learns prompts and no weights; put them before the inputs (`inputs_embeds`) instead"
_MIXED = (
    "a router of its own mixes adapters for each token; load its adapters one by one, and give a "
    "request weights by name for a fixed mixture"
)

_TYPES: Mapping[str, str] = {
    "ADALORA": f"factors with singular values between them; {MERGE}",
    "BOFT": f"it rotates the base weight; {MERGE}",
    "FOURIERFT": f"its difference is a Fourier transform; {MERGE}",
    "HRA": f"it reflects the base weight; {MERGE}",
    "IA3": f"it scales activations, and adds no matrix; {MERGE}",
    "LOHA": f"its difference is a product of matrices element by element; {MERGE}",
    "LOKR": f"its difference is a Kronecker product; {MERGE}",
    "LN_TUNING": f"it trains norms; {MERGE}",
    "OFT": f"it rotates the base weight; {MERGE}",
    "VERA": f"it scales random matrices that all modules share; {MERGE}",
    "VBLORA": f"its factors are made of shared vectors; {MERGE}",
    "RANDLORA": f"it scales random matrices that all modules share; {MERGE}",
    "POLY": _MIXED,
    "XLORA": _MIXED,
    "ADAPTION_PROMPT": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
}

_EXPORT = (
    "export with `save_pretrained(path_initial_model_for_weight_conversion=...)`, which writes a "
    f"plain LoRA of rank 2r, or {MERGE}"
)
_INITIALISATIONS: Mapping[str, str] = {
    "pissa": "PiSSA starts from principal components, which it takes out of the base weight",
    "olora": "OLoRA starts from a QR decomposition, which it takes out of the base weight",
    "corda": "CorDA starts from components of the base weight, which it takes out of it",
    "lora_ga": "LoRA-GA starts from gradients, and takes its start out of the base weight",
    "loftq": "LoftQ replaces the base weight by a quantised one that the adapter corrects",
}


def method(kind: object) -> str:
    """What an adapter of this `peft_type` is, and the way out."""
    return _TYPES.get(
        kind if isinstance(kind, str) else "", f"only LORA adapters are read; {MERGE}"
    )


def initialisation(init: object) -> str:
    """What this value of `init_lora_weights` does to the base weight, and the way out."""
    name = init.lower() if isinstance(init, str) else ""
    known = next((text for key, text in _INITIALISATIONS.items() if name.startswith(key)), None)
    why = known or "this initialisation may subtract from the base weight"
    return f"{why}, so the saved factors alone are not the whole update; {_EXPORT}"
