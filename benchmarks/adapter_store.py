"""A thousand adapters with Zipf traffic on 16 slots: what turns and waves cost on a CPU.

A Llama of hidden 512 and 4 layers, LoRA of ranks 8, 16, 32 and 64 in turn on all its linears, saved
in bfloat16. Each batch generates 16 tokens for 32 prompts of 16 tokens. The adapter of a prompt is
drawn with probability 1 / rank of popularity; batches of more than 16 adapters run in waves.

    base     all prompts have one adapter, which has a slot
    fits     the traffic is over as many adapters as there are slots
    host     it is over all of them, which host memory holds
    disk     the same, with a budget for a quarter of them; the others are read again

    kept = throughput of an arm / throughput of the base = median of paired ratios of seconds

The arm's batch is another one in every call. "slot" is the time that an adapter in host memory
takes into a slot, "read" what one takes from the disk into host memory (the page cache of the
operating system is warm).

    python benchmarks/adapter_store.py [--adapters 1000] [--blocks 20] [--out results.json]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from protocol import compare, save
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx

RANKS = (8, 16, 32, 64)
COUNTED = ("hits", "loads", "evictions")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Throughput that is to be kept where the adapters of the traffic have slots.
GOAL = 0.8


@dataclass(frozen=True)
class Sizes:
    """What is served: `prompt` and `new` are tokens."""

    adapters: int = 1000
    slots: int = 16
    batch: int = 32
    prompt: int = 16
    new: int = 16
    hidden: int = 512
    layers: int = 4


def build_model(sizes: Sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 11 // 4,
        num_hidden_layers=sizes.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@torch.no_grad()
def save_adapters(model: LlamaForCausalLM, folder: Path, count: int) -> dict[str, Path]:
    """Adapters with non-zero B, saved by PEFT."""
    made: dict[str, Path] = {}
    for rank in RANKS:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
        peft_model = get_peft_model(copy.deepcopy(model), config).to(torch.bfloat16)
        for index in range(RANKS.index(rank), count, len(RANKS)):
            for name, parameter in peft_model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
            made[f"a{index}"] = folder / f"a{index}"
            peft_model.save_pretrained(str(made[f"a{index}"]))
    return {f"a{index}": made[f"a{index}"] for index in range(count)}


class Traffic:
    """Batches of adapters, drawn by Zipf's law over the first `count` of `names`."""

    def __init__(self, names: Sequence[str], count: int, batch: int, seed: int = 0) -> None:
        self._names, self._batch = list(names[:count]), batch
        self._weights = list(itertools.accumulate(1 / (at + 1) for at in range(len(self._names))))
        self._rng = random.Random(seed)

    def __call__(self) -> list[str]:
        return self._rng.choices(self._names, cum_weights=self._weights, k=self._batch)


def serve(
    model: LlamaForCausalLM, paths: dict[str, Path], sizes: Sizes, options: Any, budget: int | None
) -> Any:
    """The model with all adapters, which are loaded one after the other."""
    config = lorafx.LoraConfig(
        target_modules=TARGETS,
        max_adapters=sizes.slots,
        max_rank=max(RANKS),
        max_host_bytes=budget,
    )
    own = {"overflow": "waves", "start": "compiled", **options}
    cm = lorafx.compile(copy.deepcopy(model), config, options=own)
    for name, path in paths.items():
        cm.load_adapter(path, name)
    for rows in (sizes.batch, 1):  # one row has graphs of its own
        generating(cm, sizes, rows)(cm.adapters[:1] * rows)
    return cm


def generating(cm: Any, sizes: Sizes, rows: int) -> Callable[[Sequence[str]], Any]:
    """Generates for so many prompts, each with its adapter."""
    ids = torch.randint(3, 4096, (rows, sizes.prompt), generator=torch.Generator().manual_seed(1))
    fixed = {"min_new_tokens": sizes.new, "max_new_tokens": sizes.new, "do_sample": False}
    mask = torch.ones_like(ids)
    return lambda names: cm.generate(ids, attention_mask=mask, **fixed, adapter_names=list(names))


def examine(cm: Any, sizes: Sizes, counts: dict[str, int], *, blocks: int) -> list[dict[str, Any]]:
    """A row for every case: what of the base's throughput it keeps, and what slots did.

    Raises:
        RuntimeError: a graph was captured while times were taken.
    """
    names, batch = cm.adapters, generating(cm, sizes, sizes.batch)
    rows: list[dict[str, Any]] = []
    for case, count in counts.items():  # each by itself: arms of one model share its slots
        draw = Traffic(names, count, sizes.batch)

        def base() -> Any:
            return batch(names[:1] * sizes.batch)

        def arm(draw: Traffic = draw) -> Any:
            return batch(draw())

        for _ in range(3):
            arm()
        before, graphs = cm.stats(), cm.recompiles
        ratios = compare(base, {case: arm}, blocks=blocks, seconds=0)
        if cm.recompiles != graphs:
            raise RuntimeError(f"{cm.recompiles - graphs} graphs were captured in {case}")
        after = cm.stats()
        for ratio in ratios:
            if ratio.arm == "A/A":
                rows.append({"case": case, **asdict(ratio), "goal": None})
                continue
            kept = {
                "kept": 1 / ratio.median,
                "kept_low": 1 / ratio.high,
                "kept_high": 1 / ratio.low,
            }
            counted = {n: getattr(after, n) - getattr(before, n) for n in COUNTED}
            counted["reads"] = after.places["host"].misses - before.places["host"].misses
            goal = GOAL if case == "fits" else None
            rows.append({"case": case, **asdict(ratio), **kept, "goal": goal, **counted})
            print(
                f"{case}: kept {kept['kept']:.3f} [{kept['kept_low']:.3f}, {kept['kept_high']:.3f}]"
            )
    return rows


def misses(cm: Any, *, attempts: int) -> list[dict[str, Any]]:
    """The times of adapters into host memory ("read", where there is a budget), and from there
    into a slot ("slot"), of which one other adapter is evicted."""
    reads: list[float] = []
    slots: list[float] = []
    rng = random.Random(2)
    for name in itertools.islice(_without_end(rng, cm.adapters), attempts):
        before, start = cm.stats(), time.perf_counter()
        cm.prefetch_adapters([name])
        middle = time.perf_counter()
        cm.pin_adapter(name)
        end = time.perf_counter()
        cm.unpin_adapter(name)
        after = cm.stats()
        if after.loads > before.loads:
            slots.append(end - middle)
            if after.places["host"].misses > before.places["host"].misses:
                reads.append(middle - start)
    rows = []
    for case, times in (("read", reads), ("slot", slots)):
        if len(times) > 1:
            p50, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
            row = {"case": case, "count": len(times), "p50_ms": p50 * 1e3, "p99_ms": p99 * 1e3}
            rows.append(row)
            print(f"{case}: p50 {p50 * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms of {len(times)}")
    return rows


def _without_end(rng: random.Random, names: Sequence[str]) -> Any:
    while True:
        yield from rng.sample(list(names), len(names))


def run(sizes: Sizes, folder: Path, options: Any, *, blocks: int) -> list[dict[str, Any]]:
    model = build_model(sizes)
    paths = save_adapters(model, folder, sizes.adapters)
    print(f"saved {len(paths)} adapters")
    attempts = max(100, 10 * blocks) if sizes.adapters > 100 else 10
    cm = serve(model, paths, sizes, options, None)
    quarter = cm.memory()["host"] // 4
    rows = examine(cm, sizes, {"fits": sizes.slots, "host": sizes.adapters}, blocks=blocks)
    rows += misses(cm, attempts=attempts)
    cm.detach()
    cm = serve(model, paths, sizes, options, quarter)
    rows += examine(cm, sizes, {"disk": sizes.adapters}, blocks=blocks)
    return rows + misses(cm, attempts=attempts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--out", type=Path)
    given = vars(parser.parse_args())
    out, blocks = given.pop("out"), given.pop("blocks")
    sizes = Sizes(**given)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows = run(sizes, Path(folder), {}, blocks=blocks)
    if out is not None:
        save(out, f"{sizes}, throughput over one adapter, and misses", list(rows))


if __name__ == "__main__":
    main()
