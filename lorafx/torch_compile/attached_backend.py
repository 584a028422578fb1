"""Frames of a marked model that its users compile themselves.

Backends of torch.compile compare equal, so Dynamo may call a graph that was captured for one model
for another of the same class: what a graph serves is found by the weights of each call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

from torch import fx

from lorafx.adapter_store.store import AdapterStore
from lorafx.capture.backend import Backend, Compilation
from lorafx.capture.bound_inputs import BoundInputs
from lorafx.capture.executable import ProgramLookup, refusing
from lorafx.capture.lowering import Lowering
from lorafx.errors import CaptureError
from lorafx.explanation import write_beside_dumps
from lorafx.model.attachment import Attachment
from lorafx.program.frame import Frame, wants_gradient
from lorafx.program.program import Program
from lorafx.program.stack import called_directly, called_module
from lorafx.torch_compile.attached import (
    AttachedSession,
    refuse_slips,
    running_session,
    session_of_weight,
)
from lorafx.torch_compile.mark_guards import drop_guards_of_attached
from lorafx.torch_compile.pending import waiting
from lorafx.torch_internals.frames import captured_self


class AttachedBackend(Backend):
    """Compiles the frames of one marked model.

    Attributes:
        session: the model's.
        adopt: marks the model that is running, where it was compiled with the same options as
            this one, and Dynamo has called a graph of this one for it.
    """

    split_by_host = False  # users' own frames serve calls of both kinds
    session: AttachedSession
    adopt: Callable[[], AttachedSession | None] | None = None

    def __init__(self, program: Program) -> None:
        super().__init__(program, self._enters)
        self.shares_graphs = True

    def compile(
        self,
        gm: fx.GraphModule,
        examples: Sequence[Any],
        lowering: Lowering,
        *,
        per_token: bool = False,
    ) -> Callable[..., Any]:
        begins = called_directly(self.entered)
        with self.session.knowing_arguments():
            executable = super().compile(gm, examples, lowering, per_token=per_token)

        def run(*arguments: Any) -> Any:
            refuse_slips()
            return executable(*arguments)

        return run if begins else executable

    def compile_lora(
        self, gm: fx.GraphModule, examples: Sequence[Any], compilation: Compilation
    ) -> Callable[..., Any]:
        if wants_gradient(examples):
            return refusing(
                CaptureError(
                    "this call needs gradients through lorafx's LoRA, which is for "
                    "inference only; call the model inside torch.no_grad() or "
                    "torch.inference_mode()"
                )
            )
        compiled = super().compile_lora(gm, examples, compilation)
        owner, checks = compilation.owner, compilation.record.checks

        def run(*arguments: Any) -> Any:
            program = owner(arguments)
            session = None if program is None else program.runtime.session
            if session is not None:
                session.begin(checks, arguments)
            return compiled(*arguments)

        return run

    def owns(self, frame: Frame) -> bool:
        # Any model of the class runs the same code: one mark says whose call it is.
        return super().owns(frame) and captured_self() is self.program.model

    def drop_guards(self, bound: BoundInputs | None) -> None:
        drop_guards_of_attached(self.program, bound)

    def owner(self, frame: Frame, weights: Sequence[int]) -> ProgramLookup:
        # Dynamo keeps executables: what they hold is never freed, so they hold no model.
        program, adopt = weakref.ref(self.program), self.adopt
        if any(item.kind in ("bank", "slots") for item in frame.inputs):
            # Dynamo guards whose slots a mark reads.
            return lambda arguments: program()

        def serves(arguments: Sequence[Any]) -> Program | None:
            # A layer that shares the graph may have sites at some of its weights only.
            found = (session_of_weight(arguments[position]) for position in weights)
            session = next((item for item in found if item), None) if weights else running_session()
            if session is None and adopt is not None and waiting():
                session = adopt()
            return None if session is None else session.program

        return serves

    def _enters(self, frame: FrameType) -> bool:
        running = self.session.running_call()
        return running is not None and called_module(frame) is running.module


def attach_session(
    program: Program, attachment: Attachment, store: AdapterStore
) -> AttachedSession:
    """The session of a model that has just been marked."""
    backend = AttachedBackend(program)
    backend.session = AttachedSession(program, store, backend, attachment)
    backend.recorded = partial(write_beside_dumps, weakref.ref(backend.session))
    return backend.session
