"""Measure on a GPU that is at hand for minutes: jobs in order of value, resumed where they stopped.

    python benchmarks/gpu_queue.py [--limit 540] [--only WORDS] [--out DIR]    run what is not done
    python benchmarks/gpu_queue.py --report        what is measured, stale, failed, never run
    python benchmarks/gpu_queue.py --self-check    every job in a tiny form on the CPU
    python benchmarks/gpu_queue.py --take DIR      bring results of --out into the repository

Each job is a subprocess (gpu_jobs.py lists them), ended at its limit or the queue's. What it has
found is written at once to benchmarks/results/gpu/<device>/, or below --out. Jobs that failed and
whose sources have changed go first, then all others that are not measured in their order, then
once more those that failed and did not change. A job that would not end in time is left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
if str(FOLDER) not in sys.path:  # PYTHONSAFEPATH keeps it off
    sys.path.insert(0, str(FOLDER))

import gpu_here  # noqa: E402
import gpu_report  # noqa: E402
from gpu_jobs import Job, all_jobs  # noqa: E402
from gpu_results import RESULTS, ROOT, Digests, Store, devices, folder_of  # noqa: E402
from gpu_runner import Queue, ended_with_jobs  # noqa: E402


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=540.0, help="seconds of this run")
    parser.add_argument("--only", action="append", metavar="WORDS", help="jobs named so, in part")
    parser.add_argument("--again", action="store_true", help="measured jobs too")
    parser.add_argument("--out", type=Path, help="write results below here, not in the repository")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="vllm.zip, sglang.zip")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--self-check", action="store_true")
    parser.add_argument("--take", type=Path, metavar="DIR")
    parser.add_argument("--can-run", action="store_true", help="whether this Python can; no output")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    jobs = [
        job
        for job in all_jobs()
        if not options.only or any(words in job.name for words in options.only)
    ]
    if options.can_run:
        return int(bool(gpu_here.lacking()))
    if options.report:
        stores = {device: Store(device, out=options.out) for device in devices()}
        gpu_report.report(jobs, stores, Digests())
        return 0
    if options.take:
        for folder in sorted(path for path in options.take.iterdir() if path.is_dir()):
            taken = Store(folder.name).take(folder)
            print(f"{folder.name}: {len(taken)} results taken")
        return 0
    if gpu_here.lacking():
        sys.exit(f"{sys.executable} lacks {', '.join(gpu_here.lacking())}")
    with tempfile.TemporaryDirectory(prefix="lorafx-gpu-") as folder:
        return _measure(jobs, options, Path(folder))


def _measure(jobs: Sequence[Job], options: argparse.Namespace, scratch: Path) -> int:
    if options.self_check:
        return gpu_here.self_check(jobs, scratch, options.peers)
    end = time.monotonic() + options.limit
    link = gpu_here.link_lorafx(scratch)

    def environment(cache: Path) -> dict[str, str]:
        return gpu_here.job_environment(link, cache) | {"LORAFX_PEERS": str(options.peers)}

    machine = gpu_here.ask_machine(environment(scratch / "cache"))
    device = folder_of(str(machine["gpu"]), str(machine["torch"]))
    queue = Queue(
        jobs,
        Store(device, RESULTS, options.out),
        machine,
        end,
        digests=Digests(),
        environment=environment,
        launch=lambda job, part: [
            *(sys.executable, str(FOLDER / "gpu_job.py"), "--part", str(part), job.name)
        ],
        commit=options.commit or gpu_here.commit_here(),
        peers=options.peers,
        again=options.again,
    )
    with ended_with_jobs(queue), gpu_report.Teller() as told:
        told.say(f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}")
        left = queue.run(scratch, told)
    waiting = [f"{job.name} ({queue.estimate(job):.0f} s)" for job in left]
    print(f"not run: {'; '.join(waiting) or 'nothing is left'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
