"""Where the ops of namespace `lorafx` are defined: a schema, an eager function and a fake one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorafx.kernels.ops.flat_arguments import flat

_LIBRARY = torch.library.Library("lorafx", "FRAGMENT")


def define(
    schema: str,
    eager: Callable[..., object],
    fake: Callable[..., object],
    backward: Callable[..., object] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Define `lorafx::<name>` by its schema; `eager` runs on every device, without gradients unless
    `backward` gives them (as torch.library.register_autograd takes both). Both functions may take
    arguments together (lorafx.kernels.ops.flat_arguments)."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, flat(eager), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafx::{name}", flat(fake), lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"lorafx::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )


def define_functional(name: str, functional: Callable[..., object]) -> None:
    """What functionalization makes of `lorafx::<name>`, which writes into an argument."""
    _LIBRARY.impl(name, functional, "Functionalize")


def define_on(key: str, name: str, eager: Callable[..., object]) -> None:
    """What `lorafx::<name>` is on devices of torch's dispatch key `key`; that of ROCm is "CUDA"."""
    _LIBRARY.impl(name, flat(eager), key)


def define_vmap(name: str, mapped: Callable[..., object]) -> None:
    """What `lorafx::<name>` is under torch.vmap (as torch.library.register_vmap takes it)."""
    torch.library.register_vmap(f"lorafx::{name}", mapped, lib=_LIBRARY)
