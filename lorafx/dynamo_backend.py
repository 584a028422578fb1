"""`torch.compile(model, backend="lorafx")`, found by its entry point.

marked model      its session's graph, base or LoRA           (lorafx.attached)
PEFT's modules    PEFT's arithmetic, fused                    (lorafx.peft_graph)
anything else     Inductor
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx

from lorafx.adapter_store.store import AdapterStore
from lorafx.attached import AttachedSession, session_of_weight, sessions
from lorafx.backend import Backend
from lorafx.compat import mode_settings
from lorafx.config import Options
from lorafx.errors import CaptureError, ConfigError, LorafxError
from lorafx.executable import Owner, refusing
from lorafx.frame import Frame
from lorafx.lowering import InductorLowering, Lowering, lowering_for
from lorafx.passes.attach import Attachment
from lorafx.peft_graph import compile_peft_frame, has_peft_lora
from lorafx.program import Program
from lorafx.record import GraphRecord


def compile_frame(
    gm: fx.GraphModule,
    examples: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The executable of one frame that Dynamo captured: the backend `lorafx`.

    Args:
        gm: the graph, one placeholder for each of `examples`.
        examples: what the frame was called with: tensors, and sizes.
        mode: a mode of torch.compile, which Inductor gets.
        options: fields of `Options`.

    Raises:
        Nothing of lorafx's own: what cannot be compiled raises when it is called, so that the
        caller gets the error itself and not one of Dynamo's around it.
    """
    try:
        settings = Options.of(options)
        patches = mode_settings(mode)
        session = _session_of(examples)
        if session is not None:
            _check_settings(session, options or {})
            lowering = lowering_for(session.program.options, patches)
            return session.backend.compile(gm, examples, lowering)
    except LorafxError as error:
        return refusing(error)
    lowering = _lowering(settings, patches)
    if has_peft_lora(gm, examples):
        return compile_peft_frame(gm, examples, options=settings, lowering=lowering)
    return lowering.base(gm, examples)


def _lowering(settings: Options, patches: Mapping[str, Any]) -> Lowering:
    """Of a frame that no session serves: Inductor unless another one was asked for, also where
    the machine lacks the compiler that it needs, which it says itself."""
    if settings.lowering == "auto":
        return InductorLowering(patches)
    return lowering_for(settings, patches)


def _session_of(examples: Sequence[Any]) -> AttachedSession | None:
    """The session whose tensors the frame takes; for a frame that takes none of any, the one
    whose model is running.

    Raises:
        CaptureError: tensors of several models, one of which serves adapters.
    """
    tensors = [example for example in examples if isinstance(example, Tensor)]
    taken = [session for session in sessions() if session.takes(tensors)]
    if len(taken) > 1 and any(session.program.runtime.active for session in taken):
        names = ", ".join(type(session.program.model).__name__ for session in taken)
        raise CaptureError(
            f"one graph holds several models with LoRA ({names}); compile each by itself"
        )
    if taken:
        return taken[0]
    return next((session for session in sessions() if session.depth and session.running()), None)


def _check_settings(session: AttachedSession, options: Mapping[str, Any]) -> None:
    """Options that torch.compile was given are those that the model was attached with."""
    known = {item.name for item in fields(Options)}
    for name, value in options.items():
        own = getattr(session.program.options, name, None)
        if name in known and value != own:
            raise ConfigError(
                f"torch.compile was given the option {name}={value!r}, and the model was attached "
                f"with {name}={own!r}; give options to lorafx.attach"
            )


class AttachedBackend(Backend):
    """Compiles the frames of one attached model.

    Backends of torch.compile compare equal, so Dynamo may call a graph that was captured here for
    another model of the same class: the program is found by the weights of each call.
    """

    session: AttachedSession

    def __init__(self, program: Program) -> None:
        super().__init__(program, self._enters)

    def compile(
        self,
        gm: fx.GraphModule,
        examples: Sequence[Any],
        lowering: Lowering,
        *,
        per_token: bool = False,
    ) -> Callable[..., Any]:
        if self.session.depth:
            self.session.note_arguments()
        return super().compile(gm, examples, lowering, per_token=per_token)

    def compile_lora(
        self,
        gm: fx.GraphModule,
        examples: Sequence[Any],
        frame: Frame,
        record: GraphRecord,
        owner: Owner,
        lowering: Lowering,
    ) -> Callable[..., Any]:
        if torch.is_grad_enabled() and any(
            isinstance(example, Tensor) and example.requires_grad for example in examples
        ):
            return refusing(
                CaptureError(
                    "gradients are wanted through LoRA of lorafx, which is for inference; call the "
                    "model inside torch.no_grad() or torch.inference_mode()"
                )
            )
        compiled = super().compile_lora(gm, examples, frame, record, owner, lowering)

        def run(*arguments: Any) -> Any:
            session = owner(arguments).runtime.session
            session.begin(record, arguments)
            return compiled(*arguments)

        return run

    def owner(self, frame: Frame, weights: Sequence[int]) -> Owner:
        program = self.program
        if any(item.kind in ("bank", "slots") for item in frame.inputs):
            # Dynamo guards whose slots a mark reads.
            return lambda arguments: program
        if weights:
            position = weights[0]
            return lambda arguments: session_of_weight(arguments[position], self.session).program
        return lambda arguments: _running(self.session).program

    def _enters(self, frame: FrameType) -> bool:
        running = self.session.running()
        return running is not None and running.frame is frame


def _running(default: AttachedSession) -> AttachedSession:
    """The session whose model is running."""
    if default.running() is not None:
        return default
    return next((session for session in sessions() if session.running()), default)


def attach_session(
    program: Program, attachment: Attachment, store: AdapterStore
) -> AttachedSession:
    """The session of a model that has just been marked."""
    backend = AttachedBackend(program)
    backend.session = AttachedSession(program, store, backend, None, attachment=attachment)
    return backend.session
