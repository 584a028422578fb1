"""Whole generation on a GPU: static cache, CUDA graphs, attention and cache included.

    python benchmarks/gpu_queue.py --only generate          (a job for each batch)

A Llama of gpu_model's sizes, prompts of 128 tokens, 32 new tokens a request, greedy, bf16. An arm
is one whole `generate(cache_implementation="static")`, timed on the host from call to tokens:

    base                 the model, which transformers compiles with CUDA graphs for static caches
    lorafx D=0, 1, 8     `cm.generate(adapter_names=...)`, Inductor's CUDA graphs on
    PEFT merged          one adapter merged into the weights; compiled as the base is
    PEFT adapter_names   the mixed batch, as PEFT serves it: eagerly

Ratios are times over the base's; new tokens a second stand beside them.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_model
import gpu_protocol
import protocol
import torch
import torch._inductor.config
from gpu_job import Context
from peft import PeftModel
from torch import Tensor

import lorafx

BATCHES = (1, 8, 64)
PROMPT, NEW = 128, 32
MIXES = (0, 1, 8)
PEFT_BLOCKS = 5  # of the mixed batch, which is far from all others


@dataclass(frozen=True)
class Generation:
    """An arm: one call of `generate`, which gives the tokens of all requests."""

    call: Callable[[], Tensor]
    copies: int = 1

    def __call__(self) -> None:
        self.call()


@contextmanager
def cuda_graphs(device: torch.device) -> Iterator[None]:
    """Inductor's own CUDA graphs for what is compiled inside, where there are any."""
    with torch._inductor.config.patch({"triton.cudagraphs": device.type == "cuda"}):
        yield


def host_time(device: torch.device) -> Callable[[Any, float], float]:
    """Seconds of one generation: transformers waits for the tokens of each step on the host."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timer(arm: Any, seconds: float) -> float:
        wait()
        start = time.perf_counter()
        arm()
        wait()
        return time.perf_counter() - start

    return timer


def tokens_of(model: Any, ids: Tensor, new: int, **more: Any) -> Tensor:
    """The new tokens of greedy generation with a static cache, (rows, new)."""
    settings = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
    settings |= {"cache_implementation": "static", "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, **settings, **more)[:, ids.shape[1] :]


def agreement(got: Tensor, want: Tensor) -> float:
    """The share of tokens up to which rows agree: after the first other token all may be others."""
    same = (got == want).long().cumprod(1)
    return float(same.float().mean())


def run_generate(context: Context, *, batch: int) -> None:
    """Job: one batch size."""
    options = gpu_model.parse([])
    prompt, new, count = PROMPT, NEW, 8
    if context.tiny:
        options.layers, options.rank = 1, 4
        batch, prompt, new, count = min(batch, 2), 2, 2, 2
    key = f"generate [{batch}, {prompt}] + {new}"
    if not context.order([key]):
        return
    with context.case(key), tempfile.TemporaryDirectory() as folder:
        sizes = {"tiny": context.tiny, "count": count}
        model, cm, _ = gpu_model.prepared(options, context.device, Path(folder), **sizes)
        paths = {f"a{index}": str(Path(folder) / f"a{index}") for index in range(count)}
        ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=context.device)
        mixes = sorted({min(distinct, batch, count) for distinct in MIXES})
        with cuda_graphs(context.device):
            rows = measure(context, (model, cm), paths, ids, new, mixes)
        context.add(key, rows)
        ratios = [f"{row['arm'].removeprefix('lorafx ')} {row['median']:.3f}" for row in rows]
        context.summarise(", ".join(ratios))


def measure(
    context: Context,
    models: tuple[Any, lorafx.CompiledModel],
    paths: dict[str, str],
    ids: Tensor,
    new: int,
    mixes: Sequence[int],
) -> list[dict[str, object]]:
    """Rows of results of one batch.

    Raises:
        RuntimeError: a mix captured a graph that warming up had not, or lorafx's tokens are others
            than the merged model's where numbers are float32.
    """
    model, cm = models
    batch = ids.shape[0]
    merged = PeftModel.from_pretrained(copy.deepcopy(model), paths["a0"]).merge_and_unload()
    mixed = PeftModel.from_pretrained(copy.deepcopy(model), paths["a0"], "a0").eval()
    for name, path in paths.items():
        if name != "a0":
            mixed.load_adapter(path, name)
    calls = {"base": lambda: tokens_of(model, ids, new)}
    for distinct in mixes:
        names = gpu_model.names_of(batch, distinct)
        calls[f"lorafx D={distinct}"] = lambda names=names: tokens_of(
            cm, ids, new, adapter_names=names
        )
    calls["PEFT merged"] = lambda: tokens_of(merged, ids, new)
    most = [name or "__base__" for name in gpu_model.names_of(batch, mixes[-1])]
    eager = f"PEFT adapter_names D={mixes[-1]}"
    calls[eager] = lambda: tokens_of(mixed, ids, new, adapter_names=most, disable_compile=True)
    warm = {name: call() for name, call in calls.items() for _ in range(1 if context.tiny else 3)}
    graphs = cm.recompiles
    got = {name: call() for name, call in calls.items() if name.startswith("lorafx")}
    if cm.recompiles != graphs:
        raise RuntimeError(f"{cm.recompiles - graphs} graphs were captured for mixes seen before")
    agreed = {
        "lorafx D=0": agreement(got["lorafx D=0"], warm["base"]),
        "lorafx D=1": agreement(got["lorafx D=1"], warm["PEFT merged"]),
    }
    if context.tiny and min(agreed.values()) < 1:
        raise RuntimeError(f"other tokens than the merged model's: {agreed}")
    meter = gpu_protocol.Meter(context.device)
    arms = {name: Generation(call) for name, call in calls.items()}
    base, slow = arms.pop("base"), {name: arms.pop(name) for name in list(arms) if name == eager}
    clock, start = host_time(context.device), gpu_protocol.clocks()
    ratios = meter.compare(base, arms, clock)
    blocks = PEFT_BLOCKS if meter.measures else 1
    ratios += protocol.compare(base, dict(slow), blocks=blocks, timer=clock)[1:]
    label = f"generate [{batch}, {ids.shape[1]}] + {new}, {model.config.num_hidden_layers} layers"
    rows = []
    for ratio in ratios:
        row = protocol.as_row(label, ratio) | {"agreement": agreed.get(ratio.arm)}
        row |= {"tokens_per_second": batch * new / ratio.milliseconds * 1e3}
        row |= {"clocks before": start, "clocks after": gpu_protocol.clocks()}
        print(f"  {ratio.arm:28s} {ratio}", flush=True)
        rows.append(row)
    return rows
