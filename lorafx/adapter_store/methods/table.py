"""METHODS: the methods that are read, and what is said of those that are not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorafx.adapter_store.methods.blocks import BDLORA, GRALORA, QALORA, TINYLORA, UNILORA, VBLORA
from lorafx.adapter_store.methods.butterfly import BOFT, LYCORIS_OFT
from lorafx.adapter_store.methods.dense import C3A, FULL, GLORA, HIRA, LYCORIS_GLORA, RANDLORA
from lorafx.adapter_store.methods.method import MERGE, AdapterMethod
from lorafx.adapter_store.methods.products import LOHA, LOKR
from lorafx.adapter_store.methods.projected import BEFT, DEFT, FROD, KASA, OSF, PEANUT
from lorafx.adapter_store.methods.scaled import ADALORA, DELORA, LOCON, MISS, PVERA, VERA
from lorafx.adapter_store.methods.sparse import FOURIERFT, SHIRA, SUPERTUNING, WAVEFT
from lorafx.adapter_store.methods.turned import HRA, IA3, OFT, ROAD

#: A new method is one entry: its reader and what its configuration may say.
METHODS: tuple[AdapterMethod, ...] = (
    *(ADALORA, LOHA, LOKR, MISS, DELORA, GRALORA, VBLORA, UNILORA, PVERA, BDLORA, LOCON),
    *(HIRA, OFT, IA3, HRA, ROAD, VERA, BOFT, LYCORIS_OFT, DEFT, BEFT, TINYLORA, KASA, QALORA),
    *(FULL, C3A, RANDLORA, GLORA, LYCORIS_GLORA, FOURIERFT, WAVEFT, SHIRA, SUPERTUNING),
    *(OSF, PEANUT, FROD),
)

_PROMPT = "it learns prompts and no weights; put them before the inputs (`inputs_embeds`) instead"
_MIXED = (
    "a router of its own mixes adapters for each token; load its adapters one by one, and give a "
    "request weights by name for a fixed mixture"
)
_ROWS = "what it adds to a row depends on other rows; train a LoRA"
_PARTS = f"it changes singular parts or clusters of W, whose signs or order no file tells; {MERGE}"
_PROMPTS = ("ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")
#: peft_type -> what to do instead.
REFUSED_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("POLY", "XLORA"), _MIXED),
    **dict.fromkeys((*_PROMPTS, "P_TUNING", "CPT", "CARTRIDGE"), _PROMPT),
    "LILY": _ROWS,
    **dict.fromkeys(("PSOFT", "ADAMSS"), _PARTS),
    "SHADOW": "a small model runs beside the base's layers; train a LoRA",
    "LN_TUNING": f"it trains norms, which have one weight for all adapters; {MERGE}",
}
#: The last parts of keys -> the other method that uses them.
_REFUSED_KEYS: Mapping[str, str] = {
    r"lora_(gate|up|down|gate_and_up)_[abAB](\..+)?": (
        "factors of grouped experts by torchtune or NeMo AutoModel: export it in PEFT's format"
    ),
    r"bundle_emb\..+": "embeddings of a textual inversion, which ignore=['bundle_emb'] leaves out",
    r"oft_(diag|[rlL])(\.weight)?": "OFT: rotations of the base weight",
    r"on_input|w_norm|b_norm": "a trained scale or norm of LyCORIS",
    r"lora_t[12]": "a Tucker decomposition of linears",
    r"ranknum(\..+)?": "AdaLoRA without its singular values (lora_E)",
    r"lora_router.*|internal_xlora_classifier.*": "a router of its own (X-LoRA, Arrow, Poly)",
    r"module_logits|poly_lora_[AB](\..+)?": "Poly: a mixture of skills",
}
REFUSED_KEYS = [
    (re.compile(rf"(?:.*\.)?(?:{keys})"), method) for keys, method in _REFUSED_KEYS.items()
]


def method_of(values: Mapping[str, Any]) -> AdapterMethod | None:
    """The method that a configuration asks for; None for LoRA, and for one that is not read."""
    kind = values.get("peft_type")
    for method in METHODS:
        if method.switch:
            if kind in (None, "LORA") and values.get(method.switch) not in (None, False):
                return method
        elif method.peft_type is not None and method.peft_type == kind:
            return method
    return None


#: Fields of a configuration of trained tokens alone.
_OF_TOKENS = frozenset({"token_indices", "target_modules", "init_weights"})


def with_tokens(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields, for trained tokens alone (TRAINABLE_TOKENS) those that LoRA has for them."""
    if values.get("peft_type") != "TRAINABLE_TOKENS":
        return values
    rest = {name: value for name, value in values.items() if name not in _OF_TOKENS}
    targets = values.get("target_modules")
    endings = map(str, targets) if isinstance(targets, list | tuple | set) else ("",)
    tokens = dict.fromkeys(endings, values.get("token_indices"))
    return {**rest, "peft_type": "LORA", "trainable_token_indices": tokens}
