"""Every transformers class that holds routed experts as 3-D parameters: served, or refused and why.

    python tests/conformance/expert_sweep.py --out experts.jsonl [--only qwen3_moe]
    python tests/conformance/expert_sweep.py --out experts.jsonl --table   (a part of families.md)

For each such class a tiny model that uses it, with two PEFT adapters of `target_parameters`: one on
every 3-D parameter of its experts, one on the second parameter alone. A batch with both and a base
row is compared with W + ΔW merged densely, each row alone. Text goes in, also to models that take
images.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import oracle
import sweep
import tiny
import torch
import transformers
from tiny import Family
from torch import nn
from transformers.models.auto import modeling_auto

import lorafx
from lorafx.errors import LorafxError

#: Auto classes by which models are found, the first that has a class wins.
MAPPINGS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_MAPPING_NAMES,
)


def families() -> Iterator[Family]:
    """Model classes whose module has the word experts beside a parameter."""
    seen: set[str] = set()
    for mapping in MAPPINGS:
        for model_type, names in mapping.items():
            for name in (names,) if isinstance(names, str) else names:
                if name in seen or not hasattr(transformers, name):
                    continue
                seen.add(name)
                try:
                    source = inspect.getsource(inspect.getmodule(getattr(transformers, name)))
                except (ImportError, OSError, TypeError):
                    continue
                if "Experts" in source:
                    yield Family("causal", model_type, name)


def experts_of(model: nn.Module) -> dict[str, list[str]]:
    """{path: names of its 3-D parameters} of the modules that hold a matrix for each expert."""
    found = {}
    for path, module in model.named_modules():
        names = [
            name
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() == 3
        ]
        if names and "xpert" in type(module).__name__:
            found[path] = names
    return found


def examine(family: Family, folder: str) -> dict[str, Any]:
    report: dict[str, Any] = sweep.named(family)
    try:
        model = tiny.build(family)
        batch = tiny.inputs(model, "causal", 3, 5, padding=False)
        with torch.no_grad():
            model(**batch)
    except Exception as error:
        return {**report, "outcome": "base", "detail": sweep.brief(error)}
    experts = experts_of(model)
    if not experts:
        return {**report, "outcome": "none"}
    report["experts"] = sorted({type(model.get_submodule(path)).__name__ for path in experts})
    report["switch"] = hasattr(model.get_submodule(next(iter(experts))), "_apply_gate")
    every = [f"{path}.{name}" for path, names in experts.items() for name in names]
    last = [f"{path}.{names[-1]}" for path, names in experts.items()]
    try:
        folders = {
            name: oracle.save_adapter(
                model, f"{folder}/{name}", rank=rank, targets=[], target_parameters=chosen
            )
            for name, rank, chosen in (("every", 3, every), ("last", 2, last))
        }
        reference = oracle.Oracle.of(model, folders)
    except Exception as error:
        return {**report, "outcome": "peft", "detail": sweep.brief(error)}
    names = ["every", None, "last"]
    try:
        cm = lorafx.compile(model, folders, options={"lowering": "reference"})
        found = oracle.tensors(cm(**batch, adapter_names=names))
    except LorafxError as error:
        return {**report, "outcome": "refused", "detail": sweep.brief(error)}
    expected = reference.rows(names, batch)
    report["effect"] = oracle.difference(reference.rows([None] * 3, batch), expected)
    report["worst"] = oracle.difference(found, expected)
    report["outcome"] = "ok" if report["worst"] <= oracle.TOLERANCE else "wrong"
    return report


def table(reports: Iterable[dict[str, Any]]) -> str:
    """The outcomes as Markdown."""
    rows = [r for r in reports if r["outcome"] != "none"]
    good = [r for r in rows if r["outcome"] == "ok"]
    lines = [
        "| model | experts | switch | outcome | why |",
        "|---|---|---|---|---|",
        *(
            f"| {r['type']} | {', '.join(r.get('experts', []))} | "
            f"{'yes' if r.get('switch') else 'no'} | {r['outcome']} | "
            f"{sweep.cell(r.get('detail', ''))} |"
            for r in rows
            if r["outcome"] != "ok"
        ),
        "",
        f"Served ({len(good)}): {', '.join(sorted({c for r in good for c in r['experts']}))}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="model types, by commas")
    parser.add_argument("--out", type=Path, default=Path("experts.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of --out instead")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a family")
    options = parser.parse_args()
    if options.table:
        print(table(sweep.read(options.out)))
        return
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    only = {name for name in options.only.split(",") if name}
    done = {r["type"] for r in sweep.read(options.out)} if options.out.exists() else set()
    with tempfile.TemporaryDirectory() as folder:
        sweep.examine(Family("causal", "llama", "LlamaForCausalLM"), folder)  # warm
    for family in families():
        if (only and family.model_type not in only) or family.model_type in done:
            continue
        report = sweep.in_child(examine, family, options.limit)
        if report["outcome"] not in ("base", "none"):
            done.add(family.model_type)
        with options.out.open("a") as file:
            file.write(json.dumps(report) + "\n")
        print(family.class_name, report, flush=True)


if __name__ == "__main__":
    main()
