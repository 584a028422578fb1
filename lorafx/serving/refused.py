"""Methods of transformers' base classes that a compiled model does not hand out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from lorafx.errors import CaptureError

_BATCHING = (
    "starts an engine that knows no adapters; use continuous_batching(...), where each request "
    "names one"
)
#: `generate` with a paged cache.
PAGED = (
    "runs an engine that knows no adapters when generate() hands over to it; use the compiled "
    "model's generate_batch(prompts, adapter_names=[...])"
)
_INJECTED = "is about adapters that PEFT puts into the model; use"

#: Methods of transformers' base classes that are not handed out -> why, and what to use.
REFUSED: Mapping[str, str] = {
    "init_continuous_batching": _BATCHING,
    "continuous_batching_context_manager": _BATCHING,
    "get_compiled_call": "compiles the model without its adapters; call the compiled model",
    "add_adapter": f"{_INJECTED} load_adapter(folder, name)",
    "disable_adapters": f"{_INJECTED} set_adapter(None), or disable_adapter() for a block",
    "enable_adapters": f"{_INJECTED} set_adapter(name)",
    "get_adapter_state_dict": f"{_INJECTED} the folder that the adapter was loaded from",
    "enable_peft_hotswap": f"{_INJECTED} load_adapter, which swaps adapters without compiling",
}


def refuse(name: str, why: str, *_: Any, **__: Any) -> NoReturn:
    """Raise CaptureError: `name` is a method that is not served."""
    raise CaptureError(
        f"{name}() {why}. To call it on the plain model, detach() first, or copy the model "
        "before it is compiled"
    )
