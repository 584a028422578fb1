"""One job of the GPU queue in a process of its own, which writes what it finds as it comes.

    python benchmarks/gpu_job.py --device NAME --out DIR [--tiny] JOB

The entry is there already; with --tiny the job runs in a tiny form on the CPU.

Exit status: 0 the job ended by itself (what was wrong stands in its entry), else it broke.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gpu_jobs import all_jobs
from gpu_results import Entry, Store, now

T = TypeVar("T")
Rows = Sequence[dict[str, Any]]
KEPT = 3000  # characters of a traceback or a log that are kept
RUNNING = "the process ended in this case"  # what a case says while it runs


def gpu_error() -> str:
    """What a call of the GPU says now; empty where all is well, or the GPU was never used."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:
        return str(error)
    return ""


def ratios(rows: Rows) -> str:
    """Each arm with its ratio, as a summary."""
    return ", ".join(f"{row['arm'].removeprefix('lorafx ')} {row['median']:.3f}" for row in rows)


class Context:
    """What a job's function is given.

    Attributes:
        entry: what was found: "rows", each with the key of its case; "failures", why, by case;
            "before", cases that failed in an earlier run; "summary", a line for the report.
        keep: puts the entry on disk.
        tiny: a self-check: small sizes, on the CPU, in Triton's interpreter.
        device: a torch.device.
    """

    def __init__(self, entry: Entry, keep: Callable[[], object], *, tiny: bool) -> None:
        import torch

        self.entry, self._keep, self.tiny = entry, keep, tiny
        self.device = torch.device("cpu" if tiny else f"cuda:{torch.cuda.current_device()}")
        self._start, self.rows = time.monotonic(), entry["rows"]

    def write(self, **found: Any) -> None:
        seconds = round(time.monotonic() - self._start, 1)
        self.entry |= {"date": now(), "seconds": seconds, **found}
        self._keep()

    def measure(
        self,
        cases: Mapping[str, T],
        measured: Callable[[T], Rows],
        summary: Callable[[Rows], str] = ratios,
    ) -> None:
        """Add the rows of each case that has none; what failed before comes last, lest it break the
        process again. An error is the case's failure, and ends the process where no later call of
        the GPU would work."""
        done = {row["key"] for row in self.rows}
        missing = [key for key in cases if key not in done]
        for key in sorted(missing, key=self.entry["before"].__contains__):
            self.fail(key, RUNNING)  # which stands if nothing else is written
            try:
                self.add(key, measured(cases[key]), summary)
            except Exception:
                self.fail(key, traceback.format_exc())
                print(f"{key}: {traceback.format_exc()}", flush=True)
                if gpu_error():
                    raise

    def add(self, key: str, rows: Rows, summary: Callable[[Rows], str]) -> None:
        """Keep the rows of a case that is done, in place of an earlier failure."""
        self.entry["failures"].pop(key, None)
        self.rows.extend({"key": key, **row} for row in rows)
        self.write(summary=summary(self.rows))

    def fail(self, key: str, why: str) -> None:
        self.entry["failures"][key] = why[-KEPT:]
        self.write()


def end_with_the_parent() -> None:
    """An orphan must not hold the GPU: end this process group once the queue is gone."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    import torch
    from gpu_protocol import machine_of

    [job] = (job for job in all_jobs() if job.name == options.name)
    store = Store(options.device, options.out)
    entry = store.entries[job.name]
    context = Context(entry, lambda: store.put(job.group, job.name, entry), tiny=options.tiny)
    entry["machine"] = machine_of(context.device)
    module, _, function = job.run.partition(":")
    with torch.no_grad():
        getattr(importlib.import_module(module), function)(context, **job.arguments)
    context.write(ended=True)


if __name__ == "__main__":
    main()
