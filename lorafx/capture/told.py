"""What is said of each graph as it is compiled: which call it is for, why no other serves it, and
where the time went.

    graph 2 lora of LlamaForCausalLM: new: one request, one token each; 12.3 s (Dynamo 4.1,
    AOTAutograd 5.0, passes 0.8, inductor 2.4)

One line a graph at level INFO of the logger `lorafx`. Why it is new is what the call has that the
nearest earlier graph's call had not, of what is known here; TORCH_LOGS="recompiles" prints every
guard that failed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from lorafx.capture.record import GraphRecord
from lorafx.program.program import Program
from lorafx.program.row_dims import PRIMARY
from lorafx.progress import LOG
from lorafx.viewer.stages import Span, exclusive


class _Local(threading.local):
    begun: float | None = None


_LOCAL = _Local()


@contextmanager
def conversion() -> Iterator[None]:
    """Around Dynamo's conversion of a frame, which it does one at a time."""
    before, _LOCAL.begun = _LOCAL.begun, time.perf_counter()
    try:
        yield
    finally:
        _LOCAL.begun = before


def note_tracing(spans: list[Span]) -> None:
    """Note how long Dynamo has traced, where its conversion is watched."""
    if _LOCAL.begun is not None:
        spans.append(Span("Dynamo", _LOCAL.begun, time.perf_counter()))


@contextmanager
def timed(spans: list[Span], what: str) -> Iterator[None]:
    """Note when the block began and ended."""
    start = time.perf_counter()
    try:
        yield
    finally:
        spans.append(Span(what, start, time.perf_counter()))


def form_of(program: Program, *, begins_call: bool, per_token: bool) -> dict[str, str]:
    """What kind of call is running, by what graphs differ in."""
    call, rows = program.call, program.runtime.rows
    named: Mapping[str, object] = {} if call is None else call.named
    tokens = next((named[name] for name in PRIMARY if isinstance(named.get(name), Tensor)), None)
    form = {
        "adapters": "with adapters" if program.runtime.active else "without adapters",
        "slots": "slots per token" if per_token else "slots per request",
        "part": "the whole call" if begins_call else "a part of a call",
        "requests": "one request" if len(rows) == 1 else "several requests",
    }
    if isinstance(tokens, Tensor) and tokens.dim() > 1:
        form["tokens"] = "one token each" if tokens.shape[1] == 1 else "several tokens each"
    for name, value in named.items():
        if isinstance(value, Tensor):
            form[name] = f"{name} of {value.dim()} dimensions, {value.dtype}"
        elif value is not None:
            form[name] = f"{name} of class {type(value).__qualname__}"
    return form


def reason(form: Mapping[str, str], earlier: Sequence[Mapping[str, str]]) -> str:
    """Why a call of this form is not served by the graphs of earlier ones."""
    if not earlier:
        return "the first"
    differences = [
        [text for what, text in form.items() if other.get(what) != text]
        + [f"no {what}" for what in other if what not in form]
        for other in earlier
    ]
    fewest = min(differences, key=len)
    if not fewest:
        return 'new for a guard that TORCH_LOGS="recompiles" prints'
    return f"new: {', '.join(fewest)}"


def tell(record: GraphRecord, model: str) -> None:
    """Log the line of a graph that was compiled."""
    LOG.info("%s of %s: %s; %s", record.title, model, record.reason, _times(record.seconds))


def tell_instance(title: str, model: str, form: Mapping[str, str], spans: Sequence[Span]) -> None:
    """Log that a call of this form was captured, and is served by a graph that there is."""
    sizes = ", ".join(form[what] for what in ("requests", "tokens") if what in form)
    LOG.info("%s of %s serves %s, too; %s", title, model, sizes, _times(exclusive(spans)))


def _times(seconds: Mapping[str, float]) -> str:
    parts = ", ".join(f"{what} {time:.1f}" for what, time in seconds.items())
    return f"{sum(seconds.values()):.1f} s ({parts})"
