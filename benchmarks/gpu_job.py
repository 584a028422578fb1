"""One job of the GPU queue in a process of its own.

    python benchmarks/gpu_job.py --part FILE NAME          run a job, results into FILE as they come
    python benchmarks/gpu_job.py --self-check NAME...      run them in a tiny form on the CPU;
                                                           with --part one, as the queue runs it
    python benchmarks/gpu_job.py --machine                 print what this machine is, as JSON

Exit status: 0 the job ended by itself (what was wrong stands in its file), else it broke.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_jobs import Job, all_jobs
from gpu_results import RUNNING, write_json

LONG_ENOUGH = 3000  # characters of a traceback that are kept


@dataclass
class Part:
    """What a job has found so far; on disk after every change.

    Attributes:
        rows: of results, each with the key of its case.
        failures: why, by case.
        before: cases that failed in an earlier run, of these sources or others.
        summary: a line for the report.
        ended: whether the job came to its end by itself.
    """

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    summary: str = ""
    ended: bool = False
    before: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():  # what earlier runs have left
            for name, value in json.loads(self.path.read_text()).items():
                setattr(self, name, value)

    def write(self) -> None:
        names = ("rows", "failures", "summary", "ended", "before")
        write_json(self.path, {name: getattr(self, name) for name in names})


class Context:
    """What a job's function is given.

    Attributes:
        tiny: a self-check: small sizes, on the CPU.
        device: a torch.device.
        part: what was found; functions use the methods here.
    """

    def __init__(self, part: Part, *, tiny: bool = False) -> None:
        import torch

        self.part, self.tiny = part, tiny
        place = "cpu" if tiny else f"cuda:{torch.cuda.current_device()}"
        self.device = torch.device(place)

    def order(self, keys: Sequence[str]) -> list[str]:
        """Those without rows; what failed before comes last, lest it break the process again."""
        done = {row["key"] for row in self.part.rows}
        missing = [key for key in keys if key not in done]
        return sorted(missing, key=lambda key: key in self.part.before)

    def add(self, key: str, rows: Sequence[dict[str, Any]]) -> None:
        """Keep the rows of a case that is done, in place of an earlier failure."""
        self.part.failures.pop(key, None)
        self.part.rows += [{"key": key, **row} for row in rows]
        self.part.write()

    def fail(self, key: str, why: str) -> None:
        self.part.failures[key] = why[-LONG_ENOUGH:]
        self.part.write()

    def summarise(self, text: str) -> None:
        """The line of the report."""
        self.part.summary = text
        self.part.write()

    @contextmanager
    def case(self, key: str) -> Iterator[None]:
        """An error in the block is the case's failure. An error of the GPU ends the process: no
        later call of it would work."""
        self.fail(key, RUNNING)  # which stands if nothing else is written
        try:
            yield
        except Exception:
            self.fail(key, traceback.format_exc())
            print(f"{key}: {traceback.format_exc()}", flush=True)
            self._end_if_the_gpu_is_lost()
        else:
            if self.part.failures.pop(key, None):
                self.part.write()

    def _end_if_the_gpu_is_lost(self) -> None:
        if self.device.type != "cuda":
            return
        import torch

        try:
            torch.cuda.synchronize()
        except Exception as error:
            print(f"the GPU takes no more calls of this process: {error}", flush=True)
            sys.stdout.flush()
            os._exit(3)


def function_of(target: str) -> Callable[..., Any]:
    """What "module:name" names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def machine() -> dict[str, object]:
    """The GPU that torch uses here, its driver, versions; what is missing, where something is.

    Raises:
        SystemExit: no GPU, or a package is missing.
    """
    import gpu_protocol

    device = gpu_protocol.require_gpu("gpu_queue.py")
    return gpu_protocol.gpu_machine(device)


def end_with_the_parent() -> None:
    """An orphan must not hold the GPU: end this process group once the queue is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def run(job: Job, part: Part, *, tiny: bool = False) -> None:
    """Call the job's function without gradients, and note that it came to its end."""
    import torch

    context = Context(part, tiny=tiny)
    part.write()
    with torch.no_grad():
        function_of(job.run)(context, **job.arguments)
    part.ended = True
    part.write()


def self_check(jobs: Sequence[Job]) -> int:
    """Run the jobs' tiny forms, each form once; how many failed or found nothing."""
    wrong = 0
    seen: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for place, job in enumerate(jobs):
            first = seen.setdefault(job.tiny_form, job.name)
            if first != job.name:
                print(f"{job.name}: in its tiny form as {first}", flush=True)
                continue
            start = time.monotonic()
            part = Part(Path(folder) / f"{place}.json")
            try:
                run(job, part, tiny=True)
            except Exception:
                part.failures["job"] = traceback.format_exc()
            verdict = "right" if part.rows and not part.failures else "WRONG"
            wrong += verdict != "right"
            seconds = time.monotonic() - start
            print(f"{job.name}: {verdict}, {len(part.rows)} rows, {seconds:.1f} s", flush=True)
            for key, why in part.failures.items():
                print(f"  {key}: {why}", flush=True)
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--part", type=Path)
    parser.add_argument("--self-check", action="store_true")
    parser.add_argument("--machine", action="store_true")
    options = parser.parse_args(arguments)
    if options.machine:
        print(json.dumps(machine()))
        return 0
    known = {job.name: job for job in all_jobs()}
    jobs = [known[name] for name in options.names]
    if options.self_check and options.part is None:
        return min(self_check(jobs), 100)
    end_with_the_parent()
    run(jobs[0], Part(options.part), tiny=options.self_check)
    return 0


if __name__ == "__main__":
    sys.exit(main())
