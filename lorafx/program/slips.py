"""Keywords of a call of the model itself that would choose an adapter elsewhere.

Nobody stands between the user and a model that is called by itself, so its keywords are found on
the Python stack, once a call: 10 µs. So are those of a pipeline of transformers that hands its
keywords to a tokenizer, which drops what it does not know.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from lorafx.model.keywords import refuse_slips
from lorafx.program.stack import call_of, outermost_call


def refuse_called_slips(belongs: Callable[[nn.Module], bool], way: str) -> None:
    """Look at the keywords of the outermost running call of a module that `belongs` is true for.
    Ours are slips too: `way` is how adapters are chosen.

    Raises:
        ConfigError: as `refuse_slips`.
    """
    running = outermost_call(belongs)
    if running is not None and running.kwargs:
        refuse_slips(running.kwargs, running.module.forward, running.module, {"": way})


def refuse_pipeline_slips(model: nn.Module) -> None:
    """Look at the keywords of the pipeline of transformers that is calling `model` without any of
    ours; nothing where none is.

    Raises:
        ConfigError: as `refuse_slips`, for names of ours too, which have not arrived.
    """
    base: Any = sys.modules.get("transformers.pipelines.base")
    if base is None:
        return
    frame = call_of(inspect.unwrap(base.Pipeline.__call__).__code__)
    if frame is None:
        return
    given = frame.f_locals
    names = {**given.get("preprocess_params", {}), **given.get("kwargs", {})}
    way = "the adapter by set_adapter(name) before the call: this pipeline hands no names on"
    refuse_slips(names, given["self"].preprocess, model, {"": way})
