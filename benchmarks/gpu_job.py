"""One job of the GPU queue in a process of its own, which writes what it finds as it comes.

    python benchmarks/gpu_job.py --device NAME [--out DIR] JOB     run a job, whose entry is there
    python benchmarks/gpu_job.py --self-check JOB...               in a tiny form on the CPU

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

from gpu_jobs import Job, all_jobs
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
        tiny: a self-check: small sizes, on the CPU.
        device: a torch.device.
    """

    def __init__(self, entry: Entry, keep: Callable[[], object], *, tiny: bool = False) -> None:
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


def run(job: Job, context: Context) -> None:
    """Call the job's function without gradients, and note that it came to its end."""
    import torch

    module, _, name = job.run.partition(":")
    with torch.no_grad():
        getattr(importlib.import_module(module), name)(context, **job.arguments)
    context.write(ended=True)


def self_check(jobs: Sequence[Job]) -> int:
    """Run the jobs' tiny forms; how many failed or found nothing."""
    wrong = 0
    for job in jobs:
        entry: Entry = {"rows": [], "failures": {}, "before": [], "seconds": 0.0}
        try:
            run(job, Context(entry, lambda: None, tiny=True))
        except Exception:
            entry["failures"]["job"] = traceback.format_exc()
        right = entry["rows"] and not entry["failures"]
        wrong += not right
        found = f"{len(entry['rows'])} rows, {entry['seconds']:.1f} s"
        print(f"{job.name}: {'right' if right else 'WRONG'}, {found}", flush=True)
        for key, why in entry["failures"].items():
            print(f"  {key}: {why}", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--self-check", action="store_true")
    options = parser.parse_args()
    known = {job.name: job for job in all_jobs()}
    jobs = [known[name] for name in options.names]
    if options.self_check:
        return min(self_check(jobs), 100)
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    from gpu_protocol import gpu_machine

    [job], store = jobs, Store(options.device, options.out)
    entry = store.entries[job.name]
    context = Context(entry, lambda: store.put(job.group, job.name, entry))
    entry["machine"] = gpu_machine(context.device)
    run(job, context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
