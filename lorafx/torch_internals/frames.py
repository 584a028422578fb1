"""The frame that Dynamo is capturing while it calls a backend.

Dynamo names places (`L['input_ids']`) by expressions over the function's locals and globals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from lorafx.torch_internals.compat import add_function_guard
from lorafx.torch_internals.versions import private_names

with private_names():
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.source import GlobalStateSource
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.utils import get_metrics_context
    from torch._guards import Guard, Source, TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv


def _translator() -> Any:
    return InstructionTranslator.current_tx()


def captured_code() -> CodeType:
    code: CodeType = _translator().output.root_tx.f_code
    return code


def ends_in_break() -> bool:
    """Whether the graph that is being compiled ends where the function breaks."""
    reason = _translator().output.compile_subgraph_reason
    return reason is not None and bool(reason.graph_break)


def failed_guard() -> str:
    """Why the newest earlier graph does not serve the call, in Dynamo's words, or how to see it."""
    known = getattr(get_metrics_context(), "_metrics", {})
    text = str(known.get("recompile_reason") or "").partition("\n")[0].partition("  #")[0]
    guard = text.partition(": ")[2].strip()  # behind the number of the graph
    return f"the guard {guard} failed" if guard else 'TORCH_LOGS="recompiles" prints the guard'


def guard_filter(keep: Callable[[Sequence[Any]], Sequence[bool]]) -> Callable[..., Sequence[bool]]:
    """`keep` as a filter of guards for Dynamo, which makes the kept guards a second time. Guards
    forget which object they saw, since some are new at each lookup, such as transformers'
    `config.per_layer_config` on torch 2.11 and 2.12."""

    def kept(entries: Sequence[Any]) -> Sequence[bool]:
        for entry in entries:
            entry.orig_guard.obj_weakref = None
        return keep(entries)

    return kept


def capture_again(reason: str) -> NoReturn:
    """Let Dynamo drop the graph and trace the function anew: its only restart from a backend."""
    _translator().speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


def source_name(node: fx.Node) -> str:
    """How Dynamo reached the graph input `node`: `L['input_ids']`."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    return node.name if source is None else source_text(source)


def size_source(node: fx.Node) -> tuple[Tensor, int] | None:
    """The tensor and the dimension whose size a graph input is; None where that is not known."""
    name, dot, size = source_name(node).rpartition(".size()[")
    if not dot or not size[:-1].isdecimal():
        return None
    value = names_of_frame()(name)
    return (value, int(size[:-1])) if isinstance(value, Tensor) else None


def input_place(node: fx.Node, position: int) -> tuple[int, str | None]:
    """Dynamo's input behind a placeholder of AOTAutograd's, and its part, such as a size."""
    place, parts = node.meta.get("desc"), []
    while place is not None and hasattr(place, "base"):
        parts.append(getattr(place, "attr", "size"))
        place = place.base
    return getattr(place, "idx", position), ".".join(reversed(parts)) or None


def symbols_of_frame() -> ShapeEnv | None:
    """The symbols of the captured frame, and what is known of them."""
    context = TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    return None if mode is None else mode.shape_env


def size_expression(size: Any) -> Any:
    """The expression of a symbolic size, any other as it is. Comparing two adds no guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def guarded_attributes(suffix: str) -> list[str]:
    """Guarded names with this suffix, but for guards that are only made on demand."""
    return [name for guard in frame_guards() if (name := source_text(guard)).endswith(suffix)]


def names_of_frame() -> Callable[[str], Any]:
    """From Dynamo's names to objects of the frame, after the capture too; None if unknown."""
    root = _translator().output.root_tx
    scope = {"L": root.f_locals, "G": root.f_globals}

    def named(name: str) -> Any:
        try:
            return eval(name, scope)
        except Exception:  # an expression over something else, such as a closure
            return None

    return named


def source_text(place: Source | Guard) -> str:
    name: Any = place.name
    return str(name() if callable(name) else name)  # a method before torch 2.12


def frame_guards() -> list[Guard]:
    context = TracingContext.try_get()
    return [] if context is None else list(context.guards_context.dynamo_guards)


def guard_frame(holds: Callable[[], bool]) -> None:
    """Let Dynamo call the graph that is being compiled only where `holds()` is true."""

    def make(builder: Any, guard: Guard) -> None:
        add_function_guard(builder.guard_manager.root, lambda _: holds())

    TracingContext.get().guards_context.dynamo_guards.add(GlobalStateSource().make_guard(make))


@contextmanager
def outside_of_frames() -> Iterator[None]:
    """Hides the captured frame from AOTAutograd and Inductor, for code compiled before."""
    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
        yield
