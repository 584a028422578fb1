"""A compiled model beside a trainer, on the trainer's own weights.

    PeftModel ──shared copy──▶ PeftModel ──taken over──▶ Sampler         parameters are the same
        └── A, B, magnitudes, own weights ──sync()──▶ slots              a new version of each

What the trainer does to the base is looked at before each call. What was written in place, or took
the place of a parameter, is served, and what depends on it is computed anew. What cannot be served
is refused by name.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from lorafx.adapter_store.peft_model import Held, adapters_in, bare_modules, refuse_merged
from lorafx.adapter_store.stored import Adapter
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import (
    CaptureError,
    ConfigError,
    LorafxWarning,
    ReplacedModuleError,
    UnknownAdapterError,
)
from lorafx.model.changes_watch import HookWatch
from lorafx.model.module_graph import join, storage_key
from lorafx.model.shared_copy import (
    Contents,
    follow_buffers,
    follow_hooks,
    own_forward,
    shared_copy,
)
from lorafx.runtime.loading import load_read
from lorafx.runtime.session import Session, read_for
from lorafx.torch_internals.versions import entrance


class Trained:
    """A model that is trained, its `copy` for a sampler, and its `adapters` by name. Raises as
    `adapters_in` and `shared_copy`, and CaptureError for sharded parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._held = adapters_in(model)
        self._modules = dict(bare_modules(self._held.base))
        self._forwards = [own_forward(vars(module)) for module in self._modules.values()]
        self._kinds = self._present_kinds()
        self._refuse_sharded()
        self.copy, copy_of = shared_copy(model)
        self.copy.eval()
        self._copies = [(module, copy_of(module)) for module in self._modules.values()]
        self._hooks, self._hook_state = HookWatch(model, ()), 0
        self._hook_numbers = set[int]()
        self._follow_hooks()
        self._removed = set[str]()

    def begin(self) -> None:
        """Compare the model from now on with what it is now: libraries of quantised weights change
        their layout with the first call, which marking makes."""
        self._kinds = self._present_kinds()
        self._record(self._held)

    @property
    def is_trained(self) -> bool:
        """Whether the base itself is trained."""
        return any(tensor.requires_grad for tensor in self._base.tensors)

    def look(self) -> bool:
        """Whether weights of the base were written or replaced since the last look.

        Raises:
            CheckpointError: adapters are merged into the base weights.
            ReplacedModuleError: a module of the base, or its forward, was replaced or removed.
            CaptureError: a parameter has another class, shape, dtype or device.
        """
        refuse_merged(self._held.merged, self.model)
        if self._hooks.look() != self._hook_state:
            self._hook_state = self._hooks.state
            self._follow_hooks()
        if self._base.intact:
            return self._base.written()
        self._refuse_changes()
        for module, copied in self._copies:
            follow_buffers(module, copied)
        self._record(adapters_in(self.model))
        return True

    def read(self, session: Session, names: Sequence[str] | None) -> dict[str, Adapter | None]:
        """The present adapters as the session serves them, those of these names or all; None for
        those that were there before and are no more. Raises as `read_adapter`, and
        UnknownAdapterError."""
        if self._scalings() != self._scales or not self._adapters.intact:
            before = self._held.adapters
            self._record(adapters_in(self.model))
            self._removed |= before.keys()
        self._removed -= self._held.adapters.keys()
        unknown = [name for name in names or () if name not in self._held.adapters]
        if unknown:
            raise UnknownAdapterError(
                f"the {type(self.model).__name__} has no adapter {unknown[0]!r}; it has "
                f"{', '.join(self._held.adapters)}"
            )
        adapters: dict[str, Adapter | None] = dict.fromkeys(self._removed)
        for name in self._held.adapters if names is None else names:
            adapters[name] = self._decoded.get(name) or self._decode(session, name)
        return adapters

    def _decode(self, session: Session, name: str) -> Adapter:
        """The adapter, which is read once if all its tensors are the trainer's own."""
        adapter = read_for(session.program, self._held.adapters[name], name)
        memory = set(map(storage_key, self._adapters.tensors))
        parts: list[Iterable[Any]] = [*adapter.weights.values(), *adapter.own_weights.values()]
        parts += [made.tensors for made in adapter.changed.values()]
        tensors = (t for part in parts for t in part if isinstance(t, Tensor))
        if all(storage_key(t) in memory for t in tensors if t.is_floating_point()):
            self._decoded[name] = adapter
        return adapter

    def _record(self, held: Held) -> None:
        """Take the model as it is now for what later looks compare it with."""
        inside = {id(module) for module in self._modules.values()}
        wrappers = [module for module in held.base.modules() if id(module) not in inside]
        self._held = held
        self._base = Contents([*self._modules.values()])
        self._adapters = Contents(wrappers)
        self._scales = self._scalings()
        self._decoded: dict[str, Adapter] = {}

    def _scalings(self) -> list[dict[str, float]]:
        return [dict(layer.scaling) for _, layer in self._held.layers]

    def _present_kinds(self) -> dict[str, tuple[Any, ...]]:
        """What graphs expect of each parameter of the base."""
        return {
            join(path, name): (type(p), p.shape, p.dtype, p.device)
            for path, module in self._modules.items()
            for name, p in module._parameters.items()
            if p is not None
        }

    def _refuse_sharded(self) -> None:
        distributed: Any = sys.modules.get("torch.distributed.tensor")
        for path, (kind, shape, *_) in self._kinds.items():
            if 0 in shape or (distributed and issubclass(kind, distributed.DTensor)):
                raise CaptureError(
                    f"{path} is sharded (a {kind.__name__} of shape {tuple(shape)}), so this "
                    "process does not have the weights to sample from: give gathered ones to a "
                    "compiled model, cm.load_weights(...)"
                )

    def _refuse_changes(self) -> None:
        present = dict(bare_modules(self._held.base))
        for (path, module), forward in zip(self._modules.items(), self._forwards, strict=True):
            replaced = "" if present.get(path) is module else path or "the base model"
            if not replaced and own_forward(vars(module)) is not forward:
                replaced = join(path, "forward")
            if replaced:
                raise ReplacedModuleError(
                    f"{replaced}, of a {type(module).__name__}, was replaced or removed in the "
                    "model that is trained, and the sampler would go on with the old one; put it "
                    "back, or make a new sampler: lorafx.sampler(peft_model)"
                )
        kinds = self._present_kinds()
        for path, kind in self._kinds.items():
            if kinds.get(path) != kind:
                raise CaptureError(
                    f"{path} has become {_described(kinds.get(path))} in the model that is "
                    f"trained; the sampler's graphs take {_described(kind)}. Put it back (gather "
                    "what is sharded) before the call, or make a new sampler: "
                    "lorafx.sampler(peft_model)"
                )

    def _follow_hooks(self) -> None:
        for module, copied in self._copies:
            follow_hooks(module, copied, self._hook_numbers)


def _described(kind: tuple[Any, ...] | None) -> str:
    if kind is None:
        return "nothing"
    class_, shape, dtype, device = kind
    return f"a {class_.__name__} of shape {tuple(shape)}, {dtype} on {device}"


class Sampler(CompiledModel):
    """A compiled model on the weights of a model that is trained meanwhile (`lorafx.sampler`).

    It is a `CompiledModel` for all calls. Base parameters are the trainer's own, so in-place steps
    of an optimiser are served by the next call. Adapters are served in the versions of the last
    `sync`. `_orig_mod` is a copy of the modules, with the same parameters.
    """

    __slots__ = ("_trained",)
    _trained: Trained

    def follow(self, trained: Trained) -> None:
        """Look at `trained` before each call from now on."""
        self._trained = trained
        trained.begin()
        self._session.follow = self._look

    def sync(self, names: Sequence[str] | None = None) -> dict[str, int]:
        """Serve the adapters as they are in the trained model now: A and B, DoRA's magnitudes, own
        weights. Adapters that were added there are loaded, those that were deleted are unloaded.

        Nothing is compiled. Each adapter gets a new version; requests of continuous batching that
        have been added keep theirs. It waits for running calls of other threads.

        Args:
            names: those that have changed; None for all.

        Returns:
            The version of each adapter, as `adapter_versions`.

        Raises:
            CheckpointError, UnsupportedAdapterError, CapacityError: an adapter that cannot be
                served, or that is merged into the base. No adapter has changed then.
            UnknownAdapterError: the trained model has no adapter of such a name.
            BatchError: the call that is running on this thread serves one of them.

        It also raises what a call raises for a base that cannot be served.
        """
        self._entries.check_attached()
        session, trained = self._session, self._trained
        with entrance():
            with session.lock:
                self._look()
            default = session.default
            load_read(session, trained.read(session, names))
            if default is not None and session.default is None:
                warnings.warn(
                    f"{default!r} was deleted in the model that is trained, and calls that name no "
                    "adapter are the base's from now on; set_adapter(name) chooses another",
                    LorafxWarning,
                    stacklevel=2,
                )
            if trained.is_trained:  # writes by `.data` are not seen
                with session.lock:
                    self._refresh()
        return self.adapter_versions

    def _look(self) -> None:
        if self._trained.look():
            self._refresh()

    def _refresh(self) -> None:
        """Compute anew what depends on the base weights. The lock is held."""
        session = self._session
        session.locks.streams.follow(session.accelerators)
        session.counts.writes += 1
        session.store.refresh_magnitudes()

    def detach(self) -> nn.Module:
        """End the sampler, and return the model that is trained, which goes on as before."""
        super().detach()
        return self._trained.model

    def load_weights(self, *_: Any, **__: Any) -> NoReturn:
        """Raises ConfigError: the weights are the trainer's."""
        self._refuse_writing("load_weights()")

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Raises ConfigError: the weights are the trainer's."""
        self._refuse_writing("load_state_dict()")

    def merge(self, *_: Any, **__: Any) -> NoReturn:
        """Raises ConfigError: the weights are the trainer's."""
        self._refuse_writing("merge()")

    def _refuse_writing(self, action: str) -> NoReturn:
        raise ConfigError(
            f"{action} of a sampler would write into the weights of the model that is trained; "
            "write into that model, which the sampler follows; export_merged(name, folder) writes "
            "a merged model to files"
        )
