"""What the cost model predicts for prefill and decode by the strategies for them, as tables.

python -m lorafx.kernels.tools.predict                   print them
python -m lorafx.kernels.tools.predict docs/kernels.md   write them there

The table of decode is predict_decode.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lorafx.kernels.cost.chips import DEFAULT_CHIP
from lorafx.kernels.cost.cost import AROUND, estimate
from lorafx.kernels.cost.persistent_cost import LEAST
from lorafx.kernels.cost.work import Work
from lorafx.kernels.tools import predict_decode

#: The packed linears of Llama-3-8B: K, and the columns of each sibling.
LINEARS = {
    "q/k/v": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate/up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
ROWS, ADAPTERS, RANK = (8192, 2048, 512), (8, 1), 16
BEGIN, END = "<!-- predicted: begin -->", "<!-- predicted: end -->"


def table() -> str:
    """Predicted time over the vendor's GEMM; with 8 adapters and with one, bfloat16.

    "persistent" is taken to have the least speed at which it is chosen.
    """
    chip = replace(DEFAULT_CHIP, persistent_over_vendor=LEAST)
    columns = [("segments", False), ("persistent", False), ("expand_first", False)]
    columns += [(name, room) for room in (False, True) for name in AROUND[1:]]
    names = [f"{name}, room" if room else name for name, room in columns]
    lines = [
        BEGIN,
        f"| rows | linear | {' | '.join(names)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for rows in ROWS:
        for label, (in_features, sizes) in LINEARS.items():
            cells = []
            for name, room in columns:
                found = []
                for distinct in ADAPTERS:
                    work = Work(in_features, sizes, rows, distinct, RANK, torch.bfloat16, chip)
                    one = estimate(replace(work, room=room))[name]
                    found.append(
                        f"({one.over_base:.2f})" if one.refusal else f"{one.over_base:.2f}"
                    )
                cells.append(" / ".join(found))
            lines.append(f"| {rows} | {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def tables() -> tuple[tuple[str, str, str], ...]:
    """(first line, last line, table) of each."""
    decode = predict_decode.table(LINEARS)
    return (BEGIN, END, table()), (predict_decode.BEGIN, predict_decode.END, decode)


def is_current(document: str) -> bool:
    """Whether the tables in `document` are what the model predicts now."""
    return all(text in document for _, _, text in tables())


def main(arguments: Sequence[str]) -> None:
    """Entry point of `python -m lorafx.kernels.tools.predict`."""
    if not arguments:
        print("\n\n".join(text for _, _, text in tables()))
        return
    path = Path(arguments[0])
    document = path.read_text()
    for first, last, text in tables():
        before, begin, rest = document.partition(first)
        if not begin:
            raise SystemExit(f"{path} has no line {first}")
        document = before + text + rest.partition(last)[2]
    path.write_text(document)


if __name__ == "__main__":
    main(sys.argv[1:])
