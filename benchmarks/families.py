"""Every transformers family against the oracle: one line each, and a table for the documentation.

    export PYTHONPATH=tests/conformance:tests/helpers
    python benchmarks/families.py --out outcome.jsonl [--part 1/2] [--only llama]
    python benchmarks/families.py --out inductor.jsonl --lowering inductor
    python benchmarks/families.py --table outcome.jsonl inductor.jsonl

`--part k/n` takes every n-th family of each kind. Lines are appended, and families that `--out` has
already are left out, so the same command goes on where it was stopped. With Inductor the families
are those of inductor_families.txt, whose graphs hold every operator of all graphs.

Each family is compiled in a process of its own (forked from one that has imported everything and
compiled a model once), with a time limit, so that a crash or a hang costs only that family.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tiny
import torch
import torch._inductor.config
import transformers
from examine import examine, failed, named
from family_table import table
from tiny import Family

#: The families that run through Inductor, "kind type" a line.
WITH_INDUCTOR = Path(__file__).parent / "inductor_families.txt"


def in_child(
    examined: Callable[[Family, str], dict[str, Any]], family: Family, limit: float
) -> dict[str, Any]:
    """`examined` of the family and a folder, in a forked process, killed after `limit` seconds."""
    began, context = time.monotonic(), multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_examine, args=(examined, family, sender))
    child.start()
    sender.close()
    try:
        answered = receiver.poll(limit)
        report = receiver.recv() if answered else None
    except EOFError:
        report = None
    if child.is_alive() and report is None and child.pid is not None:
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
    if report is None:
        why = f"crashed, status {child.exitcode}" if answered else f"no answer in {limit:.0f} s"
        report = {**named(family), "outcome": "error", "detail": why}
    report["seconds"] = round(time.monotonic() - began, 1)
    return report


def _examine(
    examined: Callable[[Family, str], dict[str, Any]], family: Family, sender: Connection
) -> None:
    os.setsid()  # compilers that it starts are killed with it
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = examined(family, folder)
        except BaseException as error:
            report = failed(family, error)
    sender.send(report)


def part_of(families: Iterable[Family], part: str) -> list[Family]:
    """Part "k/n" of the families, k from 1, with as many of each kind as the others, give or take
    one."""
    number, count = (int(item) for item in part.split("/"))
    if not 1 <= number <= count:
        raise SystemExit(f"--part {part}: write k/n with k from 1 to n")
    return sorted(families, key=lambda family: family.kind)[number - 1 :: count]


def sweep(families: list[Family], out: Path, limit: float, lowering: str) -> None:
    """Append one line a family to `out`; families that it has already are left out."""
    done = {(r["kind"], r["type"]) for r in read(out)} if out.exists() else set()
    with tempfile.TemporaryDirectory() as folder:
        examine(Family("causal", "llama", "LlamaForCausalLM"), folder, lowering=lowering)  # warm
    for family in families:
        kind, model_type = family.kind, family.model_type
        if (kind, model_type) in done:
            continue
        report = in_child(partial(examine, lowering=lowering), family, limit)
        append(out, {"lowering": lowering, **report})
        detail = str(report.get("detail", report.get("routing", "")))[:200]
        print(
            f"{kind} {model_type}: {report['outcome']} {report['seconds']} s {detail}", flush=True
        )


def append(out: Path, report: dict[str, Any]) -> None:
    """Write one line, in one write, behind whole lines only."""
    with out.open("ab+") as file:
        if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")  # whoever wrote last was killed
        file.write(json.dumps(report).encode() + b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The reports in `path`, the last one of each family and lowering."""
    found = {}
    for line in path.read_text().splitlines():
        try:
            report = json.loads(line)
        except json.JSONDecodeError:  # its writer was killed; the family runs again
            continue
        found[report["kind"], report["type"], report.get("lowering")] = report
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kinds", default=",".join(tiny.KINDS))
    parser.add_argument("--only", default="", help="model types, by commas")
    parser.add_argument("--part", default="1/1", help="k/n: this part of n")
    parser.add_argument("--out", type=Path, default=Path("families.jsonl"))
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a family")
    parser.add_argument("--lowering", default="reference", choices=("reference", "inductor"))
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these instead")
    options = parser.parse_args()
    if options.table:
        print(table([report for path in options.table for report in read(path)]))
        return
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # a pool of workers does not survive the fork
    families = [family for kind in options.kinds.split(",") for family in tiny.families(kind)]
    only = {name for name in options.only.split(",") if name}
    if only:
        families = [family for family in families if family.model_type in only]
    elif options.lowering == "inductor":
        lines = {tuple(line.split()) for line in WITH_INDUCTOR.read_text().splitlines()}
        families = [f for f in families if (f.kind, f.model_type) in lines]
    families = part_of(families, options.part)
    sweep(families, options.out, options.limit, options.lowering)


if __name__ == "__main__":
    main()
