"""Models that share modules or parameters: a draft beside its target, each with its own adapters.

A module that two compiled models hold carries one mark for each, and only the mark of the running
model may add its delta. So the sessions of such models take turns, by one lock. New base weights
apply to every model that holds them; a merge into a shared weight is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lorafx.errors import CaptureError
from lorafx.model.marks import sessions_of_marks
from lorafx.model.module_graph import storage_key
from lorafx.program.derived import overlap
from lorafx.runtime.session import Session, sessions


def join(session: Session) -> None:
    """Begin to serve the model of `session` beside those that it shares modules with.

    Raises:
        CaptureError: they cannot take turns; or a weight that it shares holds a merged adapter.
            Nothing has changed then.
    """
    found = sessions_of_marks(session.program.graph)
    others = [item for item in found if item is not session]
    if len({id(other.locks) for other in others}) > 1:
        names = ", ".join(type(other.program.model).__name__ for other in others)
        raise CaptureError(
            f"{_name(session)} shares modules with several models ({names}) that share none "
            f"with one another; give the {_name(session)} to lorafx before those models"
        )
    _refuse_merged(session)
    if others:
        session.locks = others[0].locks
    for other in others:
        other.neighbours = (*other.neighbours, session)
    session.neighbours = tuple(others)
    session.program.runtime.session = session


def leave(session: Session) -> None:
    """Serve its model no more."""
    for other in session.neighbours:
        other.neighbours = tuple(item for item in other.neighbours if item is not session)
    session.neighbours = ()
    session.program.runtime.session = None


def held_elsewhere(session: Session, tensors: Sequence[Tensor]) -> list[str]:
    """Where other served models hold one of the tensors, or memory of it."""
    wanted: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        wanted.setdefault(storage_key(tensor), []).append(tensor)
    return [
        f"{path} of another {_name(other)}"
        for other in _others(session)
        for path, tensor in _tensors(other.program.model)
        for candidate in wanted.get(storage_key(tensor), ())
        if tensor is candidate or overlap(tensor, candidate)
    ]


def refresh_elsewhere(session: Session) -> None:
    """Have the other models that hold weights of this one take up what was written into them."""
    memory = {storage_key(tensor) for _, tensor in _tensors(session.program.model)}
    for other in _others(session):
        if any(storage_key(tensor) in memory for _, tensor in _tensors(other.program.model)):
            with other.lock:
                other.locks.streams.follow(other.accelerators)
                other.counts.writes += 1
                other.store.refresh_magnitudes()


def _refuse_merged(session: Session) -> None:
    paths = {storage_key(tensor): path for path, tensor in _tensors(session.program.model)}
    for other in _others(session):
        merged = other.base.merged
        if merged is None:
            continue
        for _, tensor in _tensors(other.program.model):
            path = paths.get(storage_key(tensor))
            if path is not None:
                raise CaptureError(
                    f"{path} is shared with a {_name(other)} into which {merged.name!r} is "
                    f"merged; call unmerge() there before giving this {_name(session)} to "
                    "lorafx"
                )


def _others(session: Session) -> list[Session]:
    return [other for other in sessions() if other is not session]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _name(session: Session) -> str:
    return type(session.program.model).__name__
