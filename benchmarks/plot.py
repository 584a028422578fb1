"""The pictures of README.md, from the committed results: `make pictures` draws them anew.

    docs/pictures/cpu.svg    results/cpu_mixed.json: time over the compiled base, with intervals
    docs/pictures/peers.svg  results/cpu_peers_1b.json: time over llama.cpp

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
Arms = tuple[tuple[str, str, str], ...]
MIXED: Arms = (
    ("lorafx D=1", "lorafx, 1 adapter", "#9ecae1"),
    ("lorafx D=8", "lorafx, 8 adapters", "#2171b5"),
    ("PEFT one adapter, compiled", "PEFT, 1 adapter, compiled", "#fdae6b"),
    ("PEFT mixed, eager, D=8", "PEFT, 8 adapters", "#d94801"),
)
PEERS: Arms = (
    ("lorafx D=0", "lorafx, no adapter", "#c6dbef"),
    ("lorafx D=1", "lorafx, 1 adapter", "#6baed6"),
    ("lorafx D=8", "lorafx, 8 adapters", "#08519c"),
    ("llama.cpp, LoRA", "llama.cpp, 1 adapter", "#fdae6b"),
    ("torch.compile", "torch.compile, no adapter", "#bdbdbd"),
    ("OpenVINO", "OpenVINO, no adapter", "#74c476"),
)


def bars(
    picture: str, name: str, arms: Arms, over: str, title: str, packages: tuple[str, ...]
) -> None:
    """Bars of the ratios in results/`name`.json, and their 95 % intervals."""
    results = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    cases = list(dict.fromkeys(row["case"] for row in results["rows"]))
    rows = {(row["case"], row["arm"]): row for row in results["rows"]}
    size = min(1 + 1.75 * len(cases), 11), 3.4
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    width = 0.8 / len(arms)
    for number, (arm, label, colour) in enumerate(arms):
        places = [place for place, case in enumerate(cases) if (case, arm) in rows]
        own: list[dict[str, Any]] = [rows[cases[place], arm] for place in places]
        medians = [row["median"] for row in own]
        spread = [
            [row["median"] - row["low"] for row in own],
            [row["high"] - row["median"] for row in own],
        ]
        at = [place + (number - (len(arms) - 1) / 2) * width for place in places]
        drawn = axes.bar(at, medians, width, yerr=spread, label=label, color=colour)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7 if len(cases) < 6 else 4.5, padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), [case.replace(", weights ", "\n") for case in cases])
    axes.set_ylabel(f"time over {over}")
    machine = results["machine"]
    versions = ", ".join(
        f"{package} {machine[key].partition('+')[0]}"
        for package in packages
        if (key := package.replace("llama.cpp", "llama_cpp_python").lower()) in machine
    )
    axes.set_title(
        f"{title}, rank 16, {machine['threads']} cores ({machine['cpu']}, {versions}, "
        f"{machine['date']})",
        fontsize=8,
    )
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURES / f"{picture}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    # The same file from the same results, whenever it is drawn.
    mpl.rcParams["svg.hashsalt"] = "lorafx"
    PICTURES.mkdir(exist_ok=True)
    mixed = "A batch of 8 requests"
    bars("cpu", "cpu_mixed", MIXED, "the compiled base", mixed, ("torch", "PEFT"))
    peers = ("torch", "llama.cpp", "OpenVINO")
    title = "The shape of Llama 3.2 1B, [requests, tokens of each]"
    bars("peers", "cpu_peers_1b", PEERS, "llama.cpp without an adapter", title, peers)


if __name__ == "__main__":
    main()
