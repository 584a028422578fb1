"""The pictures of README.md, from the committed results: `make pictures` draws them anew.

    docs/pictures/cpu.svg    results/cpu_mixed.json: time over the compiled base, with intervals

Nothing is measured here. matplotlib comes with the extra `plots`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
#: What is drawn: the arm's name in the results, its name in the picture, its colour.
ARMS = (
    ("lorafx D=1", "lorafx, 1 adapter", "#9ecae1"),
    ("lorafx D=8", "lorafx, 8 adapters", "#2171b5"),
    ("PEFT one adapter, compiled", "PEFT, 1 adapter, compiled", "#fdae6b"),
    ("PEFT mixed, eager, D=8", "PEFT, 8 adapters", "#d94801"),
)


def cpu(target: Path) -> None:
    """Bars of the ratios of benchmarks/cpu_mixed.py, and their 95 % intervals."""
    results = json.loads((ROOT / "benchmarks/results/cpu_mixed.json").read_text())
    cases = list(dict.fromkeys(row["case"] for row in results["rows"]))
    rows = {(row["case"], row["arm"]): row for row in results["rows"]}
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    width = 0.8 / len(ARMS)
    for number, (arm, label, colour) in enumerate(ARMS):
        own: list[dict[str, Any]] = [rows[case, arm] for case in cases]
        medians = [row["median"] for row in own]
        spread = [
            [row["median"] - row["low"] for row in own],
            [row["high"] - row["median"] for row in own],
        ]
        at = [case + (number - (len(ARMS) - 1) / 2) * width for case in range(len(cases))]
        bars = axes.bar(at, medians, width, yerr=spread, label=label, color=colour)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("time over the compiled base")
    machine = results["machine"]
    axes.set_title(
        f"A batch of 8 requests, rank 16, {machine['threads']} cores ({machine['cpu']}, "
        f"torch {machine['torch'].partition('+')[0]}, PEFT {machine['peft']}, {machine['date']})",
        fontsize=8,
    )
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    # The same file from the same results, whenever it is drawn.
    mpl.rcParams["svg.hashsalt"] = "lorafx"
    PICTURES.mkdir(exist_ok=True)
    cpu(PICTURES / "cpu.svg")


if __name__ == "__main__":
    main()
