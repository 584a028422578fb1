"""Models that share modules or parameters: a draft beside its target, each with its own adapters.

A module of two compiled models carries one mark for each, and only the mark of the running model
may add its delta, so the sessions of such models share one lock. New base weights apply to each
model that has them; a merge into a shared weight is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lorafx.errors import CaptureError
from lorafx.model.attachment import sessions_of_marks
from lorafx.model.module_graph import ByStorage
from lorafx.runtime.session import Session, sessions


def join(session: Session) -> None:
    """Begin to serve the model of `session` beside the models with which it shares modules.

    Raises:
        CaptureError: their sessions have different locks, or an adapter is merged into a shared
            weight. Nothing has changed then.
    """
    marked = sessions_of_marks(session.program.graph)
    others = [other for other in marked if other is not session]
    if len({id(other.locks) for other in others}) > 1:
        names = ", ".join(type(other.program.model).__name__ for other in others)
        raise CaptureError(
            f"{_model_name(session)} shares modules with several models ({names}) that share none "
            f"with one another; give the {_model_name(session)} to lorafx before those models"
        )
    _refuse_merged_weights(session)
    if others:
        session.locks = others[0].locks
    for other in others:
        other.neighbours = (*other.neighbours, session)
    session.neighbours = tuple(others)
    session.program.runtime.session = session


def leave(session: Session) -> None:
    """Stop serving the model of `session`."""
    for other in session.neighbours:
        other.neighbours = tuple(item for item in other.neighbours if item is not session)
    session.neighbours = ()
    session.program.runtime.session = None


def places_in_other_models(session: Session, tensors: Sequence[Tensor]) -> list[str]:
    """The places of these tensors, or of tensors that overlap them, in other served models."""
    known = ByStorage((None, tensor) for tensor in tensors)
    return [
        f"{path} of another {_model_name(other)}"
        for other in _other_sessions(session)
        for path, tensor in _named_tensors(other.program.model)
        if known.overlapping(tensor)
    ]


def refresh_other_models(session: Session) -> None:
    """Update what other models derive from weights of this one that were written."""
    known = ByStorage(_named_tensors(session.program.model))
    for other in _other_sessions(session):
        if any(known.beside(tensor) for _, tensor in _named_tensors(other.program.model)):
            with other.lock:
                other.locks.streams.follow(other.accelerators)
                other.counts.writes += 1
                other.store.refresh_magnitudes()


def _refuse_merged_weights(session: Session) -> None:
    known = ByStorage(_named_tensors(session.program.model))
    for other in _other_sessions(session):
        merged = other.base.merged
        if merged is None:
            continue
        for _, tensor in _named_tensors(other.program.model):
            for path, _ in known.beside(tensor):
                raise CaptureError(
                    f"{path} is shared with a {_model_name(other)} into which {merged.name!r} is "
                    f"merged; call unmerge() there before giving this {_model_name(session)} to "
                    "lorafx"
                )


def _other_sessions(session: Session) -> list[Session]:
    return [other for other in sessions() if other is not session]


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _model_name(session: Session) -> str:
    return type(session.program.model).__name__
