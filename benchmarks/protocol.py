"""What all benchmarks share: the protocol of `lorafx bench`, machines, files of results."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from lorafx.integrations.cli.measuring import Ratio, compare, timed

__all__ = ["Ratio", "as_row", "compare", "machine", "save", "timed"]

# Graphs are compiled anew, except where a benchmark asks for saved ones.
os.environ.setdefault("LORAFX_CACHE_BYTES", "0")


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    packages = ("torch", "transformers", "peft")
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def save(
    path: Path,
    title: str,
    rows: list[dict[str, object]],
    machine_of: Callable[[], dict[str, object]] = machine,
) -> None:
    """Write results with the machine that they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"title": title, "machine": machine_of(), "rows": rows}, indent=1))
    print(f"wrote {path}", file=sys.stderr)


def as_row(case: str, ratio: Ratio) -> dict[str, object]:
    return {"case": case, **asdict(ratio)}
