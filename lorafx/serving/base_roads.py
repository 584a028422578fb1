"""Which graphs serve calls without an adapter (`Options.base_graphs`).

    own      those of the base: what torch.compile makes of the model
    lent     those with adapters, of which the call uses none

A call tries its roads in order. None but the last may fail and leave the call unharmed: it fails
before anything of the model has run.
"""

from __future__ import annotations

from typing import NamedTuple

from lorafx.session.session import Session


class Road(NamedTuple):
    """A way to serve a call without an adapter.

    Attributes:
        lent: by a graph with adapters.
        compiled: only where the graph is compiled already.
    """

    lent: bool
    compiled: bool = False


OWN, LENT = Road(lent=False), Road(lent=True)
_OWN_IF_COMPILED, _LENT_IF_COMPILED = Road(lent=False, compiled=True), Road(True, compiled=True)


class BaseRoads:
    """The roads of one entry.

    Attributes:
        apart: a graph with adapters could not be compiled for a call without one: from then on
            such calls have graphs of their own.
        owns: some graph of the entry is the base's own.
    """

    def __init__(self, session: Session) -> None:
        self.asked = _asked(session)
        self.apart = False
        self.owns = False

    def roads(self, *, warming: bool) -> tuple[Road, ...]:
        """The roads of the next call. `warming`: it is one of `warmup`."""
        if self.asked is True or self.apart:
            return (OWN,)
        if self.asked is False:
            return LENT, OWN
        if warming:
            return (OWN,)
        return (*((_OWN_IF_COMPILED,) if self.owns else ()), _LENT_IF_COMPILED, OWN)


def _asked(session: Session) -> bool | str:
    """`Options.base_graphs`, with "auto" made into what is best for the model.

    On a CPU a graph with adapters takes as long as the base's where no row has one. On a GPU each
    kernel of a linear looks at the slots of its rows. Run node by node, the base's graph is the
    model itself. The fast path of nn.MultiheadAttention, which adapters switch off, writes zeros
    where a batch is padded.
    """
    options, device = session.program.options, session.program.runtime.device
    if options.base_graphs != "auto":
        return options.base_graphs
    if options.lowering == "reference" or session.has_mha:
        return True
    return False if device.type == "cpu" else "warmup"
