"""transformers' `generate` over compiled forwards.

`generate` calls the model, and for encoder-decoder models the encoder by itself first. While it
runs their `forward` is the compiled entry; both are put back whatever happens. transformers would
compile static caches itself on some devices: `disable_compile` keeps it from nesting compilers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from lorafx.errors import LorafxError

if TYPE_CHECKING:
    from lorafx.serving.compiled import CompiledModel


def generate(compiled: CompiledModel, *args: Any, **kwargs: Any) -> Any:
    """The model's `generate` with its forwards compiled.

    Raises:
        LorafxError: the model has no `generate`.
    """
    model = compiled.model
    run = getattr(model, "generate", None)
    if not callable(run):
        raise LorafxError(f"{type(model).__name__} has no generate(); call the model itself")
    kwargs.setdefault("disable_compile", True)
    with _compiled_forwards(compiled, [model, *_encoders(model)]):
        return run(*args, **kwargs)


def _encoders(model: nn.Module) -> list[nn.Module]:
    """The encoder that `generate` runs by itself, for encoder-decoder models."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    get_encoder: Callable[[], nn.Module] = getattr(model, "get_encoder")  # noqa: B009
    encoder = get_encoder()
    return [] if encoder is model else [encoder]


@contextmanager
def _compiled_forwards(compiled: CompiledModel, modules: list[nn.Module]) -> Iterator[None]:
    # Entries first: each reads the module's own forward when it is made.
    entries = [(module, compiled.entry(module)) for module in modules]
    before = [(module, vars(module).get("forward")) for module in modules]
    try:
        for module, entry in entries:
            module.forward = entry
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own
