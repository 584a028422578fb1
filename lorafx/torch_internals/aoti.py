"""AOTInductor: packages, and what loads them."""

from __future__ import annotations

from lorafx.torch_internals.versions import private_names

with private_names():
    from torch._inductor import aoti_compile_and_package, aoti_load_package
