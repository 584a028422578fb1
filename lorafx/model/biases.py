"""Which modules may have biases of adapters added to what they compute.

y ← y + s·b              PEFT's lora_bias=True: b is lora_B's
y ← y + b' − b           bias="lora_only", "all": b' is the adapter's, b the base's
"""

from __future__ import annotations

from torch import Tensor

from lorafx.model.sites import Site

#: Of modules that have biases at all.
BIAS_KINDS = ("linear", "conv")


def bias_refusal(site: Site) -> str | None:
    """Why adapters cannot have biases at `site`, or None where they can."""
    entry = site.eligible
    if entry.kind not in BIAS_KINDS:
        return "only linears and convolutions have one"
    if entry.inner:
        return "PEFT leaves it out there"
    if entry.handler is not None:
        return "a registered handler says where the delta goes, but not a bias"
    if entry.sharding is not None:
        return "several ranks share it"
    return None


def bias_of(site: Site) -> Tensor | None:
    """The base's bias as it is now, a parameter or a buffer; None where there is none."""
    bias = getattr(site.module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None
