"""`lorafx.attach`: a model that its users compile themselves, and the backend of its frames.

Backends of torch.compile compare equal, so Dynamo may call a graph that was captured for one model
for another of the same class: what a graph serves is found by the weights of each call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Never

from torch import fx, nn

from lorafx.adapter_store.store import AdapterStore
from lorafx.capture.backend import Backend, Compilation
from lorafx.capture.bound_inputs import BoundInputs
from lorafx.capture.executable import ProgramLookup, refusing
from lorafx.capture.lowering import Lowering
from lorafx.config import Options
from lorafx.errors import CaptureError, ConfigError
from lorafx.explanation import Dumps
from lorafx.model.marks import Attachment, sessions_of_marks
from lorafx.prepare.marking import Marked, mark
from lorafx.program.frame import Frame, wants_gradient
from lorafx.program.program import Program
from lorafx.program.stack import called_directly, called_module
from lorafx.serving.compiled import refuse_compiled
from lorafx.serving.names import refuse_arguments
from lorafx.torch_compile.attached import (
    AttachedSession,
    refuse_slips,
    running_session,
    session_of_weight,
)
from lorafx.torch_compile.mark_guards import drop_guards_of_attached
from lorafx.torch_compile.pending import waiting
from lorafx.torch_internals.entrances import entrance
from lorafx.torch_internals.frames import captured_self


def attach(
    model: nn.Module,
    lora_config: Any = None,
    *misplaced: Never,
    adapters: Mapping[str, Any] | Sequence[Any] | None = None,
    options: Options | Mapping[str, Any] | None = None,
    **elsewhere: Never,
) -> nn.Module:
    """Mark `model` for LoRA and return it, for people who call torch.compile themselves.

        model = lorafx.attach(model, lora_config)
        compiled = torch.compile(model, backend="lorafx")
        with torch.no_grad(), lorafx.adapters(model, ["sql", None, "chat"]):
            compiled(input_ids)

    Outside a block of `lorafx.adapters` it is the base model. In eager mode it serves batches of
    one adapter. `lorafx.detach(model)` removes the marks again.

    Args:
        model, lora_config, adapters: as for `compile`. For a `peft.PeftModel` its base model is
            marked and returned.
        options: as for `compile`; they hold for every graph of the model.
        *misplaced, **elsewhere: as for `compile`.

    It raises what `compile` raises. After an error the model's modules and hooks are as they were.
    """
    refuse_arguments("lorafx.attach", misplaced, elsewhere)
    refuse_compiled(model)
    refuse_options(Options.of(options))
    with entrance():
        marked = mark(model, lora_config, adapters, options)
        _refuse_shared_weights(marked)
        attach_session(marked.program, marked.attachment, marked.store)
    return marked.program.model


def refuse_options(options: Options) -> None:
    """Raises ConfigError for what only `lorafx.compile` can do: torch.compile itself captures the
    graphs of such models, and their users call them."""
    if options.cache:
        raise ConfigError(
            "Options.cache is for models that are given to lorafx.compile; what torch.compile "
            "captures is in torch's own caches"
        )
    if options.overflow != "refuse":
        raise ConfigError(
            f"Options.overflow={options.overflow!r} is for models that are given to "
            "lorafx.compile; here nobody but the caller can split a batch"
        )


def _refuse_shared_weights(marked: Marked) -> None:
    """A graph is served by the model whose weights it is called with: no two may share one.
    Compiled models take turns; nobody can see to that where others call the model."""
    for session in sessions_of_marks(marked.program.graph):
        marked.attachment.detach()
        raise CaptureError(
            f"it shares modules with a {type(session.program.model).__name__} that "
            "lorafx.compile serves; to serve models that share modules, give each of them "
            "to lorafx.compile"
        )
    for site in marked.program.sites:
        weight = marked.program.weight_of(site)
        other = None if weight is None else session_of_weight(weight)
        if other is not None:
            marked.attachment.detach()
            raise CaptureError(
                f"the weight of {site.path} also belongs to a "
                f"{type(other.program.model).__name__} that is already attached; give one "
                "of the two models a copy, or use lorafx.compile"
            )


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

    @staticmethod
    def kind_now(program: Program) -> bool | None:
        if waiting():
            return None  # a model that is captured anew is marked then
        session = running_session()  # another model of the class may have got the graph
        return session is not None and bool(session.program.runtime.active)

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
    backend.recorded = Dumps(backend.session)
    return backend.session
