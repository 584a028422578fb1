"""The dialects, and which one a file is in."""

from __future__ import annotations

from lorafx.adapter_store.dialects.dialect import Dialect
from lorafx.adapter_store.dialects.diffusers import Diffusers
from lorafx.adapter_store.dialects.kohya import Kohya
from lorafx.adapter_store.dialects.loralib import Loralib
from lorafx.adapter_store.dialects.mlx import Mlx
from lorafx.adapter_store.dialects.other_methods import refuse_other_methods
from lorafx.adapter_store.dialects.peft import Peft
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.saved import Saved
from lorafx.errors import CheckpointError, ConfigError, nearest

#: The first one that claims a file reads it.
DIALECTS: tuple[Dialect, ...] = (Mlx(), Kohya(), Diffusers(), Loralib(), Peft())


def dialect_of(saved: Saved, name: str | None = None) -> Dialect:
    """The dialect of this name, or the one that `saved` is in.

    Raises:
        ConfigError: there is no dialect of this name.
        UnsupportedAdapterError: the keys are those of another method than LoRA.
        CheckpointError: the keys are those of no dialect.
    """
    if name is not None:
        known = {dialect.name: dialect for dialect in DIALECTS}
        if name not in known:
            raise ConfigError(
                f"there is no dialect {name!r}{nearest(str(name), known)}; dialects are "
                f"{', '.join(known)}"
            )
        return known[name]
    peft = DIALECTS[-1]
    if isinstance(saved.fields, PeftConfig):
        return peft
    refuse_other_methods(saved)
    for dialect in DIALECTS:
        if dialect.claims(saved):
            return dialect
    if saved.fields is not None:
        return peft  # which says what is wrong with each key
    first = ", ".join(repr(key[:100]) for key in list(saved.tensors)[:3]) or "no tensors"
    expected = "; ".join(f"{dialect.name}: {dialect.keys}" for dialect in DIALECTS)
    raise CheckpointError(
        f"{saved.where} has keys of no known dialect ({first}). Dialects are {expected}"
    )
