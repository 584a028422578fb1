"""Results of the GPU queue on disk, and what of them still holds.

    benchmarks/results/gpu/<device>/<group>.json = {job: entry, ...}

An entry has what a job found and under what conditions: the machine, the commit, and a digest of
the source files that the job names. Its state now:

    never run    no entry
    measured     ended by itself, and the sources are those of today
    stale        ended by itself, and the sources have changed since
    partial      was cut off; its rows are kept and not measured again while the sources stay
    failed       something was wrong, or it was killed at its own limit
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_jobs import ROOT, Job

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
Entry = dict[str, Any]
MEASURED, STALE, PARTIAL = "measured", "stale", "partial"
FAILED, NEVER = "failed", "never run"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def folder_of(device: str, torch_version: str) -> str:
    """The folder of a device, a torch: "NVIDIA H200", "2.11.0+cu130" → "nvidia-h200-torch2.11"."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{name}-torch{'.'.join(torch_version.split('.')[:2])}"


@functools.cache
def source_digest(name: str) -> bytes:
    """Of a file, or of all files of a folder, without what Python leaves there."""
    path, whole = ROOT / name, hashlib.sha256()
    # A link to a folder, as lorafx/passes, is not followed.
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_dir() and file.suffix != ".pyc":
            whole.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return whole.digest()


def digest_of(job: Job) -> str:
    """Of the job's sources and arguments."""
    about = json.dumps([job.run, job.arguments], sort_keys=True).encode()
    sources = b"".join(source_digest(name) for name in job.sources)
    return hashlib.sha256(about + sources).hexdigest()[:16]


class Store:
    """Entries of one device: those of the repository, and newer ones of `out`, to which it writes.

    Attributes:
        entries: by job; entries of jobs that are no more stay in their files.
    """

    def __init__(self, device: str, out: Path) -> None:
        self.folder = out / device
        self.entries: dict[str, Entry] = {}
        self._groups: dict[str, str] = {}
        for folder in dict.fromkeys((RESULTS / device, self.folder)):
            self.take(folder)

    def take(self, folder: Path) -> None:
        """Have the entries of a folder of this device that are newer."""
        for path in sorted(folder.glob("*.json")):
            for name, entry in json.loads(path.read_text()).items():
                if name not in self.entries or self.entries[name]["date"] < entry["date"]:
                    self.entries[name], self._groups[name] = entry, path.stem

    def put(self, group: str, name: str, entry: Entry) -> None:
        """Keep the entry, and write the file of its group, which is whole at any moment."""
        self.entries[name], self._groups[name] = entry, group
        names = [name for name in sorted(self.entries) if self._groups[name] == group]
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f"{group}.tmp"
        entries = {name: self.entries[name] for name in names}
        scratch.write_text(f"{json.dumps(entries, indent=1)}\n")
        scratch.replace(scratch.with_suffix(".json"))

    def state(self, job: Job) -> str:
        """What the job's entry is worth now."""
        entry = self.entries.get(job.name)
        if entry is None:
            return NEVER
        if entry["status"] != MEASURED:
            return str(entry["status"])
        return MEASURED if entry["sources"] == digest_of(job) else STALE
