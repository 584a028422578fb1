"""The plugin that vLLM loads in each of its processes, by the entry point `vllm.general_plugins`.

    LORAFX_VLLM=on         lorafx computes LoRA; with an unknown vLLM, LoRA is refused (the default)
    LORAFX_VLLM=fallback   the same, but an unknown vLLM computes LoRA itself, after a warning
    LORAFX_VLLM=off        vLLM computes LoRA itself

vLLM keeps its scheduler, its adapters and its layers; what it is given in place of its own code is
in patches.py. Without `--enable-lora` nothing of that runs, whatever vLLM's version is.
"""

from __future__ import annotations

import os

from lorafx.errors import ConfigError, UnsupportedVersionError, nearest
from lorafx.progress import LOG

VARIABLE = "LORAFX_VLLM"
MODES = ("on", "fallback", "off")
#: The versions of vLLM that patches.py was written for and tested with.
TESTED = ("0.32.0", "0.33.0")


def register() -> None:
    """Puts lorafx in the place of vLLM's LoRA kernels; called again, it does nothing."""
    from vllm.version import __version__ as version

    mode = os.environ.get(VARIABLE) or "on"
    if mode not in MODES:
        raise ConfigError(
            f"{VARIABLE}={mode!r} is not known{nearest(mode, MODES)}; it is one of "
            f"{', '.join(MODES)}"
        )
    if mode == "off":
        return
    from lorafx.integrations.vllm import patches

    if version.partition("+")[0] in TESTED:
        patches.apply()
        return
    known = ", ".join(TESTED)
    if mode == "fallback":
        LOG.warning(
            "lorafx does not know vLLM %s (it knows %s), so vLLM computes LoRA itself",
            *(version, known),
        )
        return
    patches.refuse_lora(
        UnsupportedVersionError(
            f"lorafx computes LoRA inside of vLLM {known}, and this is vLLM {version}: install "
            f'"vllm=={TESTED[-1]}", or let this vLLM compute LoRA itself by {VARIABLE}=off'
        )
    )
