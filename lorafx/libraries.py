"""Classes of libraries that may not be installed, asked for without importing them."""

from __future__ import annotations

import sys

#: transformers' classes of caches and of what generates.
CACHE = ("transformers.cache_utils", "Cache")
MIXIN = ("transformers.generation.utils", "GenerationMixin")


def class_of_library(module: str, name: str) -> type | None:
    """A class of a library that is imported, which takes seconds; None if it is not."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls if isinstance(cls, type) else None


def is_of_library(value: object, module: str, name: str) -> bool:
    """Whether a value is of this class of a library."""
    cls = class_of_library(module, name)
    return cls is not None and isinstance(value, cls)
