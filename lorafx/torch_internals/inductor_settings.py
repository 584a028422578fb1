"""Inductor's settings."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="settings that hold while a graph is lowered",
    ended_by="torch.compiler.config with them",
    refused='lowering="inductor" and "triton"',
)

with private_names():
    from torch._inductor import config as inductor_config
