"""load_weights: new base weights for a model that is serving.

    source ─▶ plan ─▶ writes (lorafx.weights) ─▶ what follows: norms of DoRA

Numbers are written in place, so packed buffers, tied weights and captured graphs see them. All of a
source is checked before the first write. What can be read only once (a generator) is copied to host
memory first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from lorafx.errors import ConfigError
from lorafx.model.packing import check_packed
from lorafx.runtime.session import Session
from lorafx.runtime.sharing import refresh_elsewhere
from lorafx.weights.copies import outdated_copies
from lorafx.weights.loadable_layer import methods_of
from lorafx.weights.loader import Loading
from lorafx.weights.resolve import Resolver
from lorafx.weights.sources import Weights, WeightSource, source_of
from lorafx.weights.weight_places import Target

_BROKEN = (
    "an update of the base weights was interrupted during its writes, and they are partly "
    "old and partly new; call load_weights again with all weights"
)


@dataclass(frozen=True)
class WeightUpdate:
    """What an update did, by name.

    Attributes:
        loaded: parameters and buffers of the model that got numbers; for tied ones all names.
        missing: parameters that got none or only some, and tensors that lack for a joint place.
        ignored: tensors that the model has no place for.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    ignored: tuple[str, ...]


def update_weights(session: Session, weights: Weights, *, strict: bool = True) -> WeightUpdate:
    session.refuse_running("load_weights()")
    source = source_of(weights)
    with session.weights_lock, session.lock:
        session.locks.streams.follow(session.accelerators)
        merged = session.base.merged
        if merged is not None:
            raise ConfigError(
                f"{merged.name!r} is merged into the base weights; call unmerge() before "
                "load_weights(), and merge() again after it"
            )
        report = session.update(partial(_update, session, source, strict=strict))
    refresh_elsewhere(session)
    return report


def _update(session: Session, source: WeightSource, *, strict: bool) -> WeightUpdate:
    program = session.program
    program.look_at_modules()
    program.refuse_missing()
    check_packed(program.packed)
    resolver = Resolver(program.graph, program.model, program.config.packed_modules)

    def refusals(filled: list[Target]) -> list[str]:
        return outdated_copies(program, filled, [module for module, _ in methods_of(filled)])

    loading = Loading(resolver, source, strict=strict, refusals=refusals)
    loading.check()
    filled, before = loading.filled, session.base
    session.base = before._replace(broken=_BROKEN)  # said before it is so
    loading.write()
    for module, method in methods_of(filled):
        method.process_weights_after_loading(module)
    session.store.refresh_magnitudes()
    session.base = before._replace(broken=before.broken if loading.missing else "")
    return WeightUpdate(
        tuple(str(target) for target in filled), tuple(loading.missing), tuple(loading.ignored)
    )
