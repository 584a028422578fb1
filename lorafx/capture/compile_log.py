"""The log line of each compiled graph, at level INFO of the logger `lorafx` and on a terminal.

    graph 2 lora of LlamaForCausalLM: new: a batch of one, labels given; 12.3 s (Dynamo 4.1,
    AOTAutograd 5.0, passes 0.8, inductor 2.4)

The reason is the difference from the most similar earlier graph's call, as far as it is known here,
or else the guard that failed; TORCH_LOGS="recompiles" prints all failed guards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from lorafx.capture.record import GraphRecord
from lorafx.program.argument_roles import PRIMARY
from lorafx.program.frame import Frame
from lorafx.program.program import Program
from lorafx.progress import LOG, LongWork, compiling
from lorafx.torch_internals.frames import failed_guard

#: The running conversion; Dynamo converts one frame at a time.
_running: LongWork | None = None

#: Classes of arguments whose values Dynamo guards on.
_PLAIN = (bool, int, float, str)


@contextmanager
def conversion(name: str) -> Iterator[None]:
    """Reports Dynamo's conversion of a frame of the function `name` while the block runs."""
    global _running
    before = _running
    with compiling(f"compiling {name}") as _running:
        try:
            yield
        finally:
            _running = before


def show(graph: str) -> None:
    """Show on a terminal that `graph` is being compiled."""
    if _running is not None:
        _running.show(f"compiling {graph}")


def tracing_seconds() -> float:
    """How long Dynamo has traced so far, in seconds."""
    return 0.0 if _running is None else _running.seconds


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds the block's time to `part`, without the time of parts that are timed inside of it."""
    seconds.setdefault(part, 0.0)
    start, before = time.perf_counter(), sum(seconds.values())
    try:
        yield
    finally:
        seconds[part] += time.perf_counter() - start - (sum(seconds.values()) - before)


def form_of(program: Program, frame: Frame) -> dict[str, str]:
    """The form of the running call: a text for each property in which graphs differ."""
    call, runtime, slots = program.call, program.runtime, frame.slots
    named: Mapping[str, object] = {} if call is None else call.named
    tokens = next((named[name] for name in PRIMARY if isinstance(named.get(name), Tensor)), None)
    unit = f"{slots.gates} gates" if slots.gates else "slots"
    unit = f"{slots.chosen} chosen of {unit}" if slots.chosen else unit
    form = {
        "adapters": "with adapters" if runtime.active else "without adapters",
        "slots": f"{unit} per {'token' if slots.per_token else 'request'}",
        "part": "the whole call" if frame.begins_call else "a part of a call",
        "requests": "a batch of one" if len(runtime.rows) == 1 else "several requests",
    }
    if isinstance(tokens, Tensor) and tokens.dim() > 1:
        form["tokens"] = "one token each" if tokens.shape[1] == 1 else "several tokens each"
    for name, value in named.items():
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            form[name] = f"{value.dim()}-d {dtype} {name}"
        elif isinstance(value, _PLAIN):
            form[name] = f"{name}={value!r:.40}"
        elif value is not None:
            form[name] = f"a {type(value).__qualname__} as {name}"
    if torch.is_inference_mode_enabled():
        form["inference mode"] = "inference mode"
    if program.model.training:
        form["training mode"] = "training mode"
    return form


def reason(form: Mapping[str, str], earlier: Sequence[Mapping[str, str]], changed: str = "") -> str:
    """Why the graphs of earlier calls do not serve a call of this form; `changed` is a place that
    is not as it was for the newest of them."""
    if not earlier:
        return "first call"
    nearest = min(earlier, key=partial(_distance, form))
    differences = [
        f"{key} given" if key not in nearest and text.endswith(f" {key}") else text
        for key, text in form.items()
        if nearest.get(key) != text
    ]
    differences += [f"no {key}" for key in nearest if key not in form]
    if not differences:
        return f"new: the guard {changed} failed" if changed else f"new: {failed_guard()}"
    return f"new: {', '.join(differences)}"


def _distance(form: Mapping[str, str], other: Mapping[str, str]) -> tuple[int, int]:
    differing = sum(other.get(key) != text for key, text in form.items())
    return differing + len(other.keys() - form.keys()), len(form.keys() ^ other.keys())


def tell(record: GraphRecord, model: str) -> None:
    """Log the line of a compiled graph."""
    graph = f"{record.title} of {model}"
    if _running is not None:
        shown = f"{graph}, {record.reason}"
        _running.name = _running.name if _running.name.endswith(shown) else shown
        _running.end()
    parts = ", ".join(f"{part} {duration:.1f}" for part, duration in record.seconds.items())
    total = sum(record.seconds.values())
    LOG.info("%s: %s; %.1f s (%s)", graph, record.reason, total, parts)
