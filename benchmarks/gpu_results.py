"""Results of the GPU queue on disk, and what of them still holds.

    benchmarks/results/gpu/<device>/<group>.json = {job: entry, ...}

An entry has what a job found and under what conditions: the machine, the commit, and a digest of
the source files that the job names. Its state now:

    never run    no entry
    measured     ended by itself, and the sources are those of today
    stale        ended by itself, and the sources have changed since
    partial      was cut off; its rows are kept and not measured again while the sources stay
    failed       something was wrong, or it was killed at its own limit; mended, if the sources
                 have changed since
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_jobs import Job

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
Entry = dict[str, Any]

MEASURED, STALE, PARTIAL = "measured", "stale", "partial"
RUNNING = "the process ended in this case"  # what a case says while it runs
FAILED, MENDED, NEVER = "failed", "failed, changed since", "never run"


def write_json(path: Path, value: object) -> None:
    """Write a file that is whole at any moment: it is renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as scratch:
        json.dump(value, scratch, indent=1)
        scratch.write("\n")
    os.chmod(scratch.name, 0o644)
    os.replace(scratch.name, path)


def folder_of(device: str, torch_version: str) -> str:
    """The folder of a device, a torch: "NVIDIA H200", "2.11.0+cu130" → "nvidia-h200-torch2.11"."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{name}-torch{'.'.join(torch_version.split('.')[:2])}"


# --- what a job depends on ---


def source_files(names: Iterable[str], root: Path = ROOT) -> list[Path]:
    """Files named, and all files of folders named, without what Python leaves there.

    Raises:
        FileNotFoundError: a name is neither a file nor a folder of the repository.
    """
    found: set[Path] = set()
    for name in names:
        path = root / name
        if path.is_file():
            found.add(path)
        elif path.is_dir():
            found.update(_files_below(path))
        else:
            raise FileNotFoundError(f"{name}: no file or folder of {root}")
    return sorted(found)


def _files_below(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (Path(place, name) for name in files if not name.endswith(".pyc"))


class Digests:
    """Hashes of jobs' sources; a file is read once."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self._files: dict[Path, bytes] = {}

    def of(self, job: Job, entries: Mapping[str, Entry]) -> str:
        """Of the job's sources, its arguments, and the rows of the jobs that it builds on."""
        whole = hashlib.sha256(json.dumps([job.run, job.arguments], sort_keys=True).encode())
        for path in source_files(job.sources, self.root):
            whole.update(str(path.relative_to(self.root)).encode() + self._hash(path))
        for name in job.inputs:
            kept = kept_rows(entries.get(name, {}))
            whole.update(json.dumps([name, kept], sort_keys=True).encode())
        return whole.hexdigest()[:16]

    def _hash(self, path: Path) -> bytes:
        if path not in self._files:
            self._files[path] = hashlib.sha256(path.read_bytes()).digest()
        return self._files[path]


def kept_rows(entry: Entry) -> list[dict[str, Any]]:
    """What later jobs build on: files for lorafx's cache folder that a job has left."""
    keys = ("file", "kept")
    return [{k: row[k] for k in keys} for row in entry.get("rows", ()) if "kept" in row]


def restore(rows: Iterable[dict[str, Any]], cache: Path) -> None:
    """Put kept rows back into a cache folder: tables whole, lists one behind the other."""
    for row in rows:
        path, kept = cache / row["file"], row["kept"]
        if isinstance(kept, list) and path.exists():
            kept = json.loads(path.read_text()) + kept
        write_json(path, kept)


# --- the store ---


def state_of(entry: Entry | None, digest: str) -> str:
    """What `entry` is worth where the sources' digest is `digest` now."""
    if entry is None:
        return NEVER
    same = entry["sources"] == digest
    if entry["status"] == FAILED:
        return FAILED if same else MENDED
    if entry["status"] == PARTIAL:
        return PARTIAL
    return MEASURED if same else STALE


class Store:
    """Entries of one device: those of the repository, and newer ones of `out`, to which it writes.

    Attributes:
        entries: by job; entries of jobs that are no more stay in their files.
    """

    def __init__(self, device: str, kept: Path = RESULTS, out: Path | None = None) -> None:
        self.out = (out or kept) / device
        self.groups: dict[str, dict[str, Entry]] = {}
        self.entries: dict[str, Entry] = {}
        for folder in dict.fromkeys((kept / device, self.out)):
            for path in sorted(folder.glob("*.json")):
                for name, entry in json.loads(path.read_text()).items():
                    self._newer(path.stem, name, entry)

    def _newer(self, group: str, name: str, entry: Entry) -> bool:
        before = self.entries.get(name)
        if before is not None and before["date"] > entry["date"]:
            return False
        for table in self.groups.values():
            table.pop(name, None)
        self.groups.setdefault(group, {})[name] = self.entries[name] = entry
        return True

    def put(self, group: str, name: str, entry: Entry) -> None:
        """Keep the entry, and write the file of its group."""
        self._newer(group, name, entry)
        self._write(group)

    def take(self, folder: Path) -> list[str]:
        """Take over the entries of another folder of this device that are newer; their jobs."""
        taken = []
        for path in sorted(folder.glob("*.json")):
            for name, entry in json.loads(path.read_text()).items():
                if self.entries.get(name) != entry and self._newer(path.stem, name, entry):
                    taken.append(name)
        for group in self.groups:
            self._write(group)
        return taken

    def _write(self, group: str) -> None:
        write_json(self.out / f"{group}.json", dict(sorted(self.groups[group].items())))


def devices(kept: Path = RESULTS) -> list[str]:
    """Devices that have results."""
    return sorted(path.name for path in kept.glob("*") if path.is_dir())
