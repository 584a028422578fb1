"""`lorafx.attach`: a model that its users compile themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Never

from torch import nn

from lorafx.config import Options
from lorafx.errors import CaptureError, ConfigError
from lorafx.model.attachment import sessions_of_marks
from lorafx.prepare.marking import Marked, mark
from lorafx.serving.compiled import refuse_compiled
from lorafx.serving.habits import refuse_arguments
from lorafx.torch_compile.attached import session_of_weight
from lorafx.torch_compile.attached_backend import attach_session
from lorafx.torch_internals.entrances import entrance


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
