"""Every error that lorafx raises on purpose, in one hierarchy.

`LorafxError` is the root. Errors about a value that the caller passed also derive from
`ValueError`, so that `except ValueError` keeps working for people who do not know lorafx.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorafxError(Exception):
    """Root of all errors raised by lorafx."""


class LorafxWarning(UserWarning):
    """Something may not be what the caller expects: a module left out, an assumption made."""


class ConfigError(LorafxError, ValueError):
    """A `LoraConfig`, `Options` or call argument that cannot be honoured."""


class TargetError(ConfigError):
    """`target_modules` names nothing, or names a module that cannot carry LoRA."""


class CheckpointError(LorafxError, ValueError):
    """An adapter checkpoint that is absent, truncated, misshapen or for another model."""


class BaseWeightsError(CheckpointError):
    """Base weights that do not fit the model. `problems` lists everything that is wrong."""

    problems: tuple[str, ...] = ()


class UnsupportedAdapterError(CheckpointError):
    """An adapter whose configuration asks for arithmetic that lorafx does not support."""


class UnknownAdapterError(LorafxError, ValueError):
    """A request names an adapter that is not loaded."""


class CapacityError(LorafxError, ValueError):
    """More distinct adapters, or a larger rank, than the banks were allocated for."""


class BatchError(LorafxError, ValueError):
    """The rows of a batch and the adapters named for them do not fit together."""


class MatchError(LorafxError):
    """A selected weight is used in a way that lorafx cannot apply LoRA to."""


class ProvenanceError(LorafxError):
    """It cannot be proved which request a row belongs to, and the batch mixes adapters."""


class CaptureError(LorafxError):
    """The model cannot be captured as asked (recompile limit, attach after compile)."""


class ReplacedModuleError(CaptureError):
    """A module that carries LoRA is not where it was when lorafx was given the model."""


class VerifyError(LorafxError):
    """A pass left a graph that is malformed or computes something else."""


class LoweringError(LorafxError):
    """A kernel could not be generated, compiled or loaded."""


#: How alike two names are that may be the same, by difflib's measure from 0 to 1. At 0.4 "conv" was
#: near to "fc_in".
_ALIKE = 0.6


def nearest(name: str, candidates: Iterable[str], count: int = 3, *, cutoff: float = _ALIKE) -> str:
    """A sentence fragment naming the closest candidates to `name`, or an empty string where none is
    near: at least `cutoff` alike, or another in one character."""
    known = list(candidates)
    close = difflib.get_close_matches(name, known, n=count, cutoff=cutoff)
    slips = {other for other in known if other not in close and _one_apart(name, other)}
    close += sorted(slips, reverse=True)
    return f"; nearest: {', '.join(close[:count])}" if close else ""


def _one_apart(name: str, other: str) -> bool:
    return len(name) == len(other) > 1 and sum(map(str.__ne__, name, other)) == 1
