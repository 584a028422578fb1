"""Decode steps behind a context on a CPU: lorafx, torch.compile, transformers and llama.cpp.

A Llama of hidden size 1024 with 16 heads of queries and 4 of keys, 6 layers, LoRA of rank 16 on all
linears; each request has `context` tokens in the cache, and gets one more. Time over llama.cpp
without an adapter, by turns in one run; where it is not installed over torch.compile. All steps
begin with the same cache.

    python benchmarks/decode_context.py [--quick] [--context 256 1024] [--rows 1 8]
                                        [--dtype fp32|bf16]
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_mixed import build_model, save_adapters
from cpu_peers import DTYPES, LlamaCpp, machine_and_peers, write_adapter, write_gguf
from protocol import rows_of, save
from torch import Tensor

import lorafx

TITLE = "a decode step behind a context over llama.cpp, Llama 1024/2816 of 6 layers, r=16"


class LlamaCppBehind(LlamaCpp):
    """Decodes a token for each row of `ids`, which are in its cache."""

    def __init__(self, model: Path, ids: Tensor, adapter: Path | None = None) -> None:
        super().__init__(model, ids, adapter, room=len(ids))
        super().__call__()
        (self.rows, self.length), self.count = ids.shape, len(ids)
        self.batch = self.library.llama_batch_init(self.rows, 0, self.rows)
        self.batch.n_tokens = self.rows
        for row in range(self.rows):
            self.batch.token[row], self.batch.pos[row] = 1, self.length
            self.batch.n_seq_id[row], self.batch.seq_id[row][0] = 1, row
            self.batch.logits[row] = True

    def __call__(self) -> None:
        memory = self.library.llama_get_memory(self.context)
        for row in range(self.rows):
            self.library.llama_memory_seq_rm(memory, row, self.length, -1)
        assert self.library.llama_decode(self.context, self.batch) == 0
        self.library.llama_synchronize(self.context)


def behind(model: Callable[..., Any], cache: Any, rows: int, **settings: Any) -> Callable[[], Any]:
    """A step of `model` for a token of each row behind what is in `cache`."""
    before = [(layer.keys, layer.values) for layer in cache.layers]
    ids = torch.ones(rows, 1, dtype=torch.long)

    def step() -> Any:
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            layer.keys, layer.values = keys, values
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **settings)

    return step


def run_case(
    weights: str, rows: int, context: int, layers: int, blocks: int, seconds: float, folder: Path
) -> list[dict[str, object]]:
    model, base = (
        build_model(layers, DTYPES[weights], num_key_value_heads=4, max_position_embeddings=4096)
        for _ in range(2)
    )
    ids = torch.randint(0, model.config.vocab_size, (rows, context))
    paths = save_adapters(model, folder)
    torch._dynamo.reset()
    cm = lorafx.compile(model, dict(paths), options={"start": "compiled"})
    cache = base(ids, use_cache=True).past_key_values
    names = [name for name, _ in zip(itertools.cycle(paths), ids, strict=False)]
    arms: dict[str, Callable[[], Any]] = {
        "lorafx D=0": behind(cm, cache, rows, adapter_names=[None] * rows),
        "lorafx D=1": behind(cm, cache, rows, adapter_names=["a0"] * rows),
    }
    if rows > 1:
        arms[f"lorafx D={rows}"] = behind(cm, cache, rows, adapter_names=names)
    arms["transformers"] = behind(base, cache, rows)
    arms["torch.compile"] = behind(torch.compile(base, dynamic=True), cache, rows)
    want, got = arms["transformers"]().logits.float(), arms["lorafx D=0"]().logits.float()
    difference = float((got - want).norm() / want.norm())
    assert difference <= (1e-4 if weights == "fp32" else 5e-2), f"lorafx is {difference} off"
    first = arms["torch.compile"]
    if importlib.util.find_spec("llama_cpp"):
        write_gguf(model, folder / "model.gguf", weights)
        write_adapter(paths["a0"], folder / "adapter.gguf")
        first = LlamaCppBehind(folder / "model.gguf", ids)
        arms["llama.cpp, LoRA"] = LlamaCppBehind(
            folder / "model.gguf", ids, folder / "adapter.gguf"
        )
    label = f"{rows} rows behind {context} tokens, {weights}"
    return rows_of(label, first, arms, blocks=blocks, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 layers, 5 blocks; nothing saved")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), action="append")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode_context.json"))
    options = parser.parse_args()
    layers, blocks, seconds = (2, 5, 0.02) if options.quick else (6, 15, 0.1)
    rows = []
    with torch.no_grad():
        for case in itertools.product(
            options.dtype or ("fp32", "bf16"), options.rows, options.context
        ):
            with tempfile.TemporaryDirectory() as folder:
                rows += run_case(*case, layers, blocks, seconds, Path(folder))
            if not options.quick:
                save(options.out, TITLE, rows, machine_and_peers)


if __name__ == "__main__":
    main()
