"""Reads of a configuration's fields are traced as plain reads.

transformers' configurations have a `__getattribute__` in two of their classes: one exchanges names
by `attribute_map`, the other refuses fields that differ by layer. Dynamo traces both at each read,
and the forward of a Llama makes fifty: a seventh of the capture of one layer. Where the name is in
no map, and the layers are all alike, both give what `object.__getattribute__` gives.

The guards of the values stay. They read the fields as Python does, so a configuration whose layers
come to differ fails them. Guards that the class's map lacks a name are not made.
"""

from __future__ import annotations

import sys
from typing import Any

from torch._dynamo.variables import user_defined

from lorafx.capture.interception import Interception


def _var_getattr(read: Any, image: Any, tx: Any, name: str) -> Any:
    return image.generic_getattr(tx, name) if _plain(image, tx, name) else read(image, tx, name)


def _plain(image: Any, tx: Any, name: str) -> bool:
    """Whether `object.__getattribute__` gives the attribute `name` of what `image` stands for."""
    if not hasattr(image, "generic_getattr"):  # torch before 2.13
        return False
    module: Any = sys.modules.get("transformers.configuration_utils")
    config = image.value
    if module is None or not isinstance(config, module.PreTrainedConfig):
        return False
    if type(config).__getattribute__ is not module.PreTrainedConfig.__getattribute__:
        return False
    if name == "attribute_map" or name in type(config).attribute_map:
        return False
    fields = object.__getattribute__(config, "__dict__")
    if "attribute_map" in fields or fields.get("_heterogeneity_spec") is not None:
        return False
    return not tx.output.side_effects.has_pending_mutation(image)


_READS = Interception(user_defined.UserDefinedObjectVariable, "var_getattr", _var_getattr)

#: Inside, this thread converts a frame of ours.
plain_config_reads = _READS.on
