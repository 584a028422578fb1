"""Time of a process's first `generate`, beside torch.compile of the base alone.

Each arm is a process of its own with empty caches: a random Llama of hidden size 512, a prompt of
seven tokens and 17 more, four requests. lorafx serves a mixed batch, every second row with an
adapter of rank 16 at all linears, also without the shortcut compiler_ahead; torch.compile compiles
the model's forward, without adapters, with dynamic=True (as lorafx does) and with its default,
None. The time is that of the call, in wall seconds and in CPU seconds with the compilers that it
starts. `later` is the second `generate`.

    python benchmarks/first_generate.py [--depth N] [--out FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from compile_time import llama, spent
from protocol import in_process, save, save_adapter

#: What torch.compile is told of sizes, by arm.
DYNAMIC = {"torch.compile, dynamic=True": True, "torch.compile, dynamic=None": None}
SHORTCUTS = {"lorafx": None, "lorafx without compiler_ahead": ["needless_guards", "written_back"]}
ARMS = (*SHORTCUTS, *DYNAMIC)


def first_generate(layers: int, arm: str, folder: str) -> dict[str, float]:
    """Seconds of the first call in this process and of the second."""
    import torch

    torch.manual_seed(0)
    model = llama(layers).eval().requires_grad_(False)
    ids = torch.randint(0, 4096, (4, 7))
    served: Any = model
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given |= {"max_new_tokens": 17, "do_sample": False, "pad_token_id": 0}
    if arm in DYNAMIC:
        model.forward = torch.compile(model.forward, dynamic=DYNAMIC[arm])  # type: ignore[method-assign]
    else:
        import lorafx

        adapter = save_adapter(model, Path(folder), 16, r".*layers.*_proj")
        options = {"start": "compiled", "shortcuts": SHORTCUTS[arm]}
        served = lorafx.compile(model, {"a": adapter}, options=options)
        given["adapter_names"] = ["a", None, "a", None]
    first, later = (spent(lambda: served.generate(**given)) for _ in range(2))
    cpu = first["cpu"] + first["compilers"]
    return {"seconds": first["seconds"], "cpu": cpu, "later": later["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, action="append", help="layers; 2 and 32 without it")
    parser.add_argument("--out", help="a file for the rows; nothing is saved without it")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for layers in options.depth or [2, 32]:
        for arm in ARMS:
            with tempfile.TemporaryDirectory() as folder:
                given = (__file__, "first_generate", layers, arm, folder)
                row = in_process(*given, cache=Path(folder))
            rows.append({"layers": layers, "arm": arm, **row})
            figures = ", ".join(f"{name} {value:.2f}" for name, value in row.items())
            print(f"{layers:3d} layers, {arm}: {figures}", flush=True)
    if options.out:
        save(Path(options.out), "first generate, Llama of hidden 512, four rows", rows)


if __name__ == "__main__":
    main()
