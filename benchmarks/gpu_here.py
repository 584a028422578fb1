"""The machine that the GPU queue runs on: packages, paths of its jobs, the GPU's name."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_jobs import Job
from gpu_results import ROOT

FOLDER = Path(__file__).resolve().parent
NEEDED = ("torch", "triton", "safetensors", "jinja2", "transformers", "peft", "pytest")


def job_environment(link: Path, cache: Path) -> dict[str, str]:
    """Where jobs find lorafx, this folder, the tests' helpers, and lorafx's files."""
    paths = [str(FOLDER), str(ROOT / "tests" / "helpers"), str(link)]
    rest = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return found | {
        "PYTHONPATH": os.pathsep.join([*paths, *rest]),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "LORAFX_CACHE_DIR": str(cache),
    }


def link_lorafx(scratch: Path) -> Path:
    """A folder to find lorafx in where it is not installed: a link, and its entry points.

    The root itself must not be on the path, where passes/ and kernels/ would shadow others."""
    folder = scratch / "site"
    folder.mkdir(exist_ok=True)
    if importlib.util.find_spec("lorafx") is not None:
        return folder
    import tomllib

    (folder / "lorafx").symlink_to(ROOT / "lorafx")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.search(r'^__version__ = "(.+)"', (ROOT / "lorafx/__init__.py").read_text(), re.M)
    assert found is not None
    version = found[1]
    about = folder / f"lorafx-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lorafx\nVersion: {version}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def missing(job: Job, peers: Path) -> list[str]:
    """Packages that the job needs and that are neither installed nor in the folder `peers`."""
    needed = [name for name in job.needs if not (peers / f"{name}.zip").exists()]
    return [name for name in needed if importlib.util.find_spec(name) is None]


def lacking() -> list[str]:
    """Packages that jobs need and this Python does not have."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def ask_machine(environment: dict[str, str]) -> dict[str, object]:
    """What this machine is, asked of another process: the queue itself leaves the GPU alone.

    Raises:
        SystemExit: there is no GPU, or torch cannot be imported.
    """
    command = [sys.executable, str(FOLDER / "gpu_job.py"), "--machine"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip() or f"gpu_job.py --machine ended with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def commit_here() -> str:
    """HEAD, marked where files differ from it; empty where there is no git."""
    try:
        options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True}
        head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], check=True, **options)
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + (" with changes" if changed.stdout.strip() else "")


def self_check(jobs: Sequence[Job], scratch: Path, peers: Path) -> int:
    """Every job in its tiny form, in one process on the CPU."""
    environment = job_environment(link_lorafx(scratch), scratch / "cache")
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "LORAFX_PEERS": str(peers)}
    for job in jobs:
        if missing(job, peers):
            print(f"{job.name}: not checked, {', '.join(job.needs)} is not at hand", flush=True)
    names = [job.name for job in jobs if not missing(job, peers)]
    command = [sys.executable, str(FOLDER / "gpu_job.py"), "--self-check", *names]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
