"""The machine that the GPU queue runs on: packages, and the paths and processes of its jobs."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import tomllib
from contextlib import suppress
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
NEEDED = ("torch", "triton", "safetensors", "jinja2", "transformers", "peft", "pytest")


def is_here(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def job_environment(scratch: Path) -> dict[str, str]:
    """Where jobs find lorafx, this folder, and the tests' helpers."""
    paths = [str(FOLDER), str(ROOT / "tests" / "helpers"), str(link_lorafx(scratch))]
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    always = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return environment | always | {"PYTHONPATH": ":".join(paths)}


def link_lorafx(scratch: Path) -> Path:
    """A folder to find lorafx in where it is not installed: a link, and its entry points.

    The root itself must not be on the path, where passes/ and kernels/ would shadow others."""
    folder = scratch / "site"
    folder.mkdir()
    if not is_here("lorafx"):
        (folder / "lorafx").symlink_to(ROOT / "lorafx")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        source = (ROOT / "lorafx/__init__.py").read_text()
        version = re.findall(r'^__version__ = "(.+)"', source, re.M)[0]
        about = folder / f"lorafx-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: lorafx\nVersion: {version}\n"
        )
        with (about / "entry_points.txt").open("w") as file:
            for group, points in project["entry-points"].items():
                lines = [f"{name} = {target}" for name, target in points.items()]
                print(f"[{group}]", *lines, sep="\n", file=file)
    return folder


def stop(process: subprocess.Popen[bytes]) -> int:
    """End the job's processes where they still run; its exit status. What it found is on disk."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started
    return process.wait()
