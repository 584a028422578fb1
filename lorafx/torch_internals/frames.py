"""The frame that Dynamo is capturing while it calls a backend.

Dynamo names places by expressions over the function's locals and globals (`L['input_ids']`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
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


def ends_in_break() -> bool:
    """Whether the graph that is being compiled ends in a graph break."""
    reason = _translator().output.compile_subgraph_reason
    return reason is not None and bool(reason.graph_break)


def failed_guard() -> str:
    """Why the newest graph does not serve the call, in Dynamo's words, or how to find out."""
    metrics = getattr(get_metrics_context(), "_metrics", {})
    text = str(metrics.get("recompile_reason") or "").partition("\n")[0].partition("  #")[0]
    guard = text.partition(": ")[2].strip()  # after the number of the graph
    return f"the guard {guard} failed" if guard else 'TORCH_LOGS="recompiles" prints the guard'


def guard_filter(keep: Callable[[Sequence[Any]], Sequence[bool]]) -> Callable[..., Sequence[bool]]:
    """`keep` as a guard filter for Dynamo, which makes the kept guards a second time. References to
    guarded objects are removed, since some objects are new at each lookup, such as transformers'
    `config.per_layer_config` on torch 2.11 and 2.12."""

    def filter_guards(entries: Sequence[Any]) -> Sequence[bool]:
        for entry in entries:
            entry.orig_guard.obj_weakref = None
        return keep(entries)

    return filter_guards


def capture_again(reason: str) -> NoReturn:
    """Make Dynamo drop the graph and trace the function again, by its only restart for backends."""
    _translator().speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


def source_name(node: fx.Node) -> str:
    """The place where Dynamo found the graph input `node`, such as `L['input_ids']`."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    return node.name if source is None else source_text(source)


def size_source(node: fx.Node) -> tuple[Tensor, int] | None:
    """The tensor and the dimension whose size a graph input is; None if they are not known."""
    name, dot, size = source_name(node).rpartition(".size()[")
    if not dot or not size[:-1].isdecimal():
        return None
    value = names_of_frame()(name)
    return (value, int(size[:-1])) if isinstance(value, Tensor) else None


def input_place(node: fx.Node, position: int) -> tuple[int, str | None]:
    """The number of Dynamo's input for a placeholder of AOTAutograd's, and the part, as a size."""
    place, parts = node.meta.get("desc"), []
    while place is not None and hasattr(place, "base"):
        parts.append(getattr(place, "attr", "size"))
        place = place.base
    return getattr(place, "idx", position), ".".join(reversed(parts)) or None


def size_expression(size: Any) -> Any:
    """The expression of a symbolic size, or the size itself; comparing two adds no guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def largest_size(size: torch.SymInt) -> int | None:
    """The largest value of a symbolic size that its graph's guards allow; None for no limit."""
    shapes: Any = size.node.shape_env
    upper = shapes.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer else None


def guarded_attributes(suffix: str) -> list[str]:
    """The guarded names with this suffix, except for guards that Dynamo makes on demand."""
    context = TracingContext.try_get()
    guards = () if context is None else context.guards_context.dynamo_guards
    return [name for guard in guards if (name := source_text(guard)).endswith(suffix)]


def names_of_frame() -> Callable[[str], Any]:
    """A function from Dynamo's names to objects of the frame, or None; it works later, too."""
    root = _translator().output.root_tx
    scope = {"L": root.f_locals, "G": root.f_globals}

    def value_of(name: str) -> Any:
        try:
            return eval(name, scope)
        except Exception:  # the expression reads something else, such as a closure
            return None

    return value_of


def places_in_order() -> Collection[Source]:
    """The places of dictionaries over which the captured frame iterates; more are added until the
    capture has ended."""
    return _translator().output.guard_on_key_order


def source_text(place: Source | Guard) -> str:
    name: Any = place.name
    return str(name() if callable(name) else name)  # a method before torch 2.12


def guard_argument(guard: Guard) -> Any:
    """The key, attribute or second place that a guard is about; None if it has none."""
    if not isinstance(guard.create_fn, partial):
        return None
    named = guard.create_fn.keywords
    given = (named[name] for name in ("key", "attr", "source_b") if name in named)
    return next(chain(guard.create_fn.args, given), None)


def guard_frame(holds: Callable[[Any], bool], kind: str = "FRAME") -> None:
    """Make Dynamo call the graph that is being compiled only if `holds(f_locals)` is true. `kind`
    is the name of the guard's kind."""

    def make(builder: Any, guard: Guard) -> None:
        add_function_guard(builder.guard_manager.root, holds)

    make.__name__ = kind
    TracingContext.get().guards_context.dynamo_guards.add(GlobalStateSource().make_guard(make))


@contextmanager
def outside_of_frames() -> Iterator[None]:
    """Hides the captured frame from AOTAutograd and Inductor in the block, for other code."""
    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
        yield
