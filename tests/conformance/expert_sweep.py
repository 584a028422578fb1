"""Every transformers class that holds routed experts as 3-D parameters: served, or refused and why.

    python tests/conformance/expert_sweep.py --out experts.jsonl [--only qwen3_moe]
    python tests/conformance/expert_sweep.py --out experts.jsonl --table   (docs/routed_experts.md)

For each such class a tiny model that uses it, with two PEFT adapters of `target_parameters`: one on
every 3-D parameter of its experts, one on the second parameter alone. A batch with both and a base
row is compared with W + ΔW merged densely, each row alone. Text goes in, also to models that take
images. Where no tiny model can be built, the class is tried in a block of its own, with a router.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import types
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import oracle
import sweep
import tiny
import torch
import transformers
from examine import brief, named
from examine import examine as examine_family
from sites import experts_of
from table import cell
from tiny import Family
from tiny_inputs import inputs
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


EXPERTS = 4
#: What classes of experts read of a configuration, under every name that they read it by.
CONFIG: dict[str, Any] = {
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
    ),
    "hidden_size": 64,
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 32),
    **dict.fromkeys(("hidden_act", "hidden_activation"), "silu"),
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.7,
}


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


class Block(nn.Module):
    """A linear, a router, and experts that take tokens, the chosen experts and their weights."""

    def __init__(self, experts: nn.Module, hidden: int, count: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, hidden)
        self.router = nn.Linear(hidden, count, bias=False)
        self.experts = experts

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.inner(x)
        flat = x.flatten(0, -2)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        return {"logits": x + self.experts(flat, chosen, weights).view_as(x)}


def classes() -> Iterator[tuple[str, type[nn.Module]]]:
    """(module's name, class) of everything that is called experts."""
    seen = set()
    for family in families():
        module = inspect.getmodule(getattr(transformers, family.class_name))
        for name, cls in vars(module).items():
            if not (name.endswith("Experts") and isinstance(cls, type)) or cls in seen:
                continue
            if issubclass(cls, nn.Module) and cls.__module__ == module.__name__:
                seen.add(cls)
                yield module.__name__.rpartition(".modeling_")[2], cls


def examine_class(name: str, cls: type[nn.Module], folder: str) -> dict[str, Any]:
    report: dict[str, Any] = {"kind": "block", "type": f"{name} {cls.__name__}"}
    report["experts"] = [cls.__name__]
    config = types.SimpleNamespace(_experts_implementation="grouped_mm", **CONFIG)
    try:
        torch.manual_seed(0)
        experts = cls(config)
        names = [n for n, p in experts._parameters.items() if p is not None and p.dim() == 3]
        block = Block(experts, CONFIG["hidden_size"], EXPERTS).eval().requires_grad_(False)
        tiny.randomise(block)
        x = torch.randn(4, 3, CONFIG["hidden_size"])
        block(x)
    except Exception as error:
        return {**report, "outcome": "base", "detail": brief(error)}
    report["switch"] = hasattr(experts, "has_gate")
    return {**report, **compared(block, {"experts": names}, {"x": x}, folder)}


def examine(family: Family, folder: str) -> dict[str, Any]:
    report: dict[str, Any] = named(family)
    try:
        model = tiny.build(family)
        batch = inputs(model, "causal", 3, 5, padding=False)
        with torch.no_grad():
            model(**batch)
    except Exception as error:
        return {**report, "outcome": "base", "detail": brief(error)}
    experts = experts_of(model)
    if not experts:
        return {**report, "outcome": "none"}
    report["experts"] = sorted({type(model.get_submodule(path)).__name__ for path in experts})
    report["switch"] = hasattr(model.get_submodule(next(iter(experts))), "_apply_gate")
    return {**report, **compared(model, experts, batch, folder)}


def compared(
    model: nn.Module, experts: dict[str, list[str]], batch: dict[str, torch.Tensor], folder: str
) -> dict[str, Any]:
    """A mixed batch of the compiled model against dense merge."""
    report: dict[str, Any] = {}
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
        return {"outcome": "peft", "detail": brief(error)}
    names = ["every", None, "last", "every"][: len(next(iter(batch.values())))]
    expected = reference.rows(names, batch)
    base = reference.rows([None] * len(names), batch)
    try:
        cm = lorafx.compile(model, folders, options={"lowering": "reference"})
        found = oracle.tensors(cm(**batch, adapter_names=names))
    except LorafxError as error:
        return {"outcome": "refused", "detail": brief(error)}
    report["effect"] = oracle.difference(base, expected)
    report["worst"] = oracle.difference(found, expected)
    report["outcome"] = "ok" if report["worst"] <= oracle.TOLERANCE else "wrong"
    return report


def table(reports: Iterable[dict[str, Any]]) -> str:
    """The outcomes as Markdown."""
    rows = [r for r in reports if "experts" in r]
    good = {cls for r in rows if r["outcome"] == "ok" for cls in r["experts"]}
    alone = {cls for r in rows if r["kind"] == "block" for cls in r["experts"]} & good
    others = {
        cls: r for r in rows if r["outcome"] != "ok" for cls in r["experts"] if cls not in good
    }
    return "\n".join(
        [
            f"Served in a model ({len(good - alone)}): {', '.join(sorted(good - alone))}.",
            "",
            f"Served in a block of their own ({len(alone)}): {', '.join(sorted(alone))}.",
            "",
            "| class | outcome | why |",
            "|---|---|---|",
            *(
                f"| {cls} | {r['outcome']} | {cell(r.get('detail', ''))} |"
                for cls, r in sorted(others.items())
            ),
        ]
    )


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
        examine_family(Family("causal", "llama", "LlamaForCausalLM"), folder)  # warm
    for family in families():
        if (only and family.model_type not in only) or family.model_type in done:
            continue
        report = sweep.in_child(examine, family, options.limit)
        if report["outcome"] not in ("base", "none"):
            done.add(family.model_type)
        _write(options.out, report)
    good = {cls for r in sweep.read(options.out) if r["outcome"] == "ok" for cls in r["experts"]}
    for name, cls in classes():
        if cls.__name__ in good or (only and name not in only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            _write(options.out, examine_class(name, cls, folder))


def _write(out: Path, report: dict[str, Any]) -> None:
    with out.open("a") as file:
        file.write(json.dumps(report) + "\n")
    print(report, flush=True)


if __name__ == "__main__":
    main()
