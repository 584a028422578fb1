"""How Inductor takes operators apart."""

from __future__ import annotations

from lorafx.torch_internals.entries import Required, private_names

ENTRY = Required(
    use="graphs are decomposed as Inductor wants them, but for matrix products",
    ended_by="Inductor's table under torch.compiler",
)

with private_names():
    from torch._inductor import lowering as _lowering  # max_pool2d's decomposition reaches for it
    from torch._inductor.decomposition import select_decomp_table
