"""What all benchmarks share: the protocol of `lorafx bench`, processes, machines, results."""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lorafx.integrations.cli.measuring import Ratio, compare, timed

__all__ = ["Ratio", "as_row", "compare", "errors", "in_process", "machine", "names_of"]
__all__ += ["output_of", "rows_of", "save", "save_adapter", "timed", "versions_of"]

RESULTS = Path(__file__).parent / "results"
#: The program of a process that calls a function of a file and prints what it returns.
CALL = """import importlib, json, sys
module, name, arguments = sys.argv[1:]
print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(arguments))))"""

# Graphs are compiled anew, except where a benchmark asks for saved ones.
os.environ.setdefault("LORAFX_CACHE_BYTES", "0")


# --- processes ---


def output_of(command: Sequence[object], **variables: str) -> str:
    """What a command prints; of other Pythons, too, since PYTHONPATH is given only if it is named.

    Raises:
        RuntimeError: it fails; with the end of what it says of it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment | variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def in_process(
    file: str,
    function: str,
    *arguments: object,
    cache: Path | None = None,
    saved_graphs: bool = False,
    **variables: str,
) -> Any:
    """The result of a function of a benchmark's file in a fresh process. `cache`: of Inductor and
    of lorafx, in the place of the user's; `saved_graphs`: that of graphs is used by default, too.
    """
    paths = [str(Path(file).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    if cache is not None:
        variables |= {
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "LORAFX_CACHE_DIR": str(cache / "lorafx"),
            "LORAFX_CACHE_BYTES": str(2**30 * saved_graphs),
        }
    command = [sys.executable, "-c", CALL, Path(file).stem, function, json.dumps(arguments)]
    return json.loads(output_of(command, **variables).splitlines()[-1])


# --- adapters ---


@torch.no_grad()
def save_adapter(
    model: Any,
    path: Path,
    rank: int,
    targets: Any,
    *,
    std: float | None = None,
    seed: int | None = None,
    **more: Any,
) -> str:
    """Have PEFT save an adapter whose factors are normal, or for `std` None PEFT's, B not zero; its
    path. `more` is of LoraConfig."""
    from peft import LoraConfig, get_peft_model

    if seed is not None:
        torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False, **more
    )
    peft_model = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in peft_model.named_parameters():
        if std is not None and "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    peft_model.save_pretrained(str(path))
    return str(path)


def names_of(batch: int, distinct: int) -> list[str | None]:
    """The adapter of each request: D of them in turn; the base where D is 0."""
    return [f"a{row % distinct}" if distinct else None for row in range(batch)]


def errors(
    model: Any,
    paths: Mapping[str, str],
    logits: torch.Tensor,
    ids: torch.Tensor,
    names: Sequence[str | None],
) -> list[tuple[float, float]]:
    """Of the first row, one in the middle and the last: the largest error of `logits` against dense
    merge in float64, and that of the merged model in the model's own dtype."""
    from peft import PeftModel

    found = []
    for row in sorted({0, len(names) // 2, len(names) - 1}):
        exact, name, one = copy.deepcopy(model).double(), names[row], ids[row : row + 1]
        if name is not None:
            exact = PeftModel.from_pretrained(exact, paths[name]).merge_and_unload()
        want = exact(input_ids=one, use_cache=False).logits[0]
        own = exact.to(model.dtype)(input_ids=one, use_cache=False).logits[0]
        largest = [float((got.double() - want).abs().max()) for got in (logits[row], own)]
        found.append((largest[0], largest[1]))
    return found


# --- results ---


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


def versions_of(python: Path, *packages: str) -> dict[str, str]:
    """Of packages of another Python."""
    code = "import json, sys; from importlib.metadata import version as v\n"
    code += "print(json.dumps({name: v(name) for name in sys.argv[1:]}))"
    found: dict[str, str] = json.loads(output_of([python, "-c", code, *packages]))
    return found


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
    rows: Sequence[Mapping[str, object]],
    machine_of: Callable[[], dict[str, object]] = machine,
) -> None:
    """Write results with the machine that they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"title": title, "machine": machine_of(), "rows": rows}, indent=1))
    print(f"wrote {path}", file=sys.stderr)


def rows_of(case: str, base: Any, arms: Mapping[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """Rows of results of `compare`, which are printed; `settings` are arguments of it."""
    rows = []
    for ratio in compare(base, arms, **settings):
        print(f"  {case}: {ratio.arm:28s} {ratio}", flush=True)
        rows.append(as_row(case, ratio))
    return rows


def as_row(case: str, ratio: Ratio) -> dict[str, Any]:
    return {"case": case, **asdict(ratio)}
