"""Keywords of a call of the model itself that would choose an adapter elsewhere.

Nobody stands between the user and a model that is called by itself, so its keywords are found on
the Python stack, once a call: 10 µs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lorafx.model.keywords import refuse_slips
from lorafx.program.stack import outermost_call


def refuse_called_slips(belongs: Callable[[nn.Module], bool], way: str) -> None:
    """Look at the keywords of the outermost running call of a module that `belongs` is true for.
    Ours are slips too: `way` is how adapters are chosen.

    Raises:
        ConfigError: as `refuse_slips`.
    """
    running = outermost_call(belongs)
    if running is not None and running.kwargs:
        refuse_slips(running.kwargs, running.module.forward, running.module, {"": way})
