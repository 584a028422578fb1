"""Whole steps and whole generation of a Llama-3-8B-shaped model on a GPU: jobs of the queue.

Layers of Llama-3-8B's sizes (fewer of them, the vocabulary in proportion), LoRA on all linears of
the layers, bf16, random weights.

run_step: every arm is a CUDA graph of one step, captured here; a mix is set by a call outside of
the graph, which writes the slots that the graph reads. Base: the same model under torch.compile.
Decode is [batch, 1] and prefill [8, 1024], without a key/value cache: a cache would add the same to
both.

run_generate: prompts of 128 tokens, 32 new tokens a request, greedy. An arm is one whole
`generate(cache_implementation="static")`, timed on the host from call to tokens:

    base                 the model, which transformers compiles with CUDA graphs for static caches
    lorafx D=0, 1, 8     `cm.generate(adapter_names=...)`, Inductor's CUDA graphs on
    PEFT merged          one adapter merged into the weights; compiled as the base is
    PEFT adapter_names   the mixed batch, as PEFT serves it: eagerly

Ratios are times over the base's; new tokens a second stand beside them.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_protocol
import torch
import torch._inductor.config
from cpu_mixed import peft_mixed
from gpu_job import Context, Rows
from peft import PeftModel
from protocol import errors, names_of, save_adapter
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx
from lorafx.kernels.cost.roofline import factor_elements

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Adapters of the mixes of a step.
MIXES: Mapping[tuple[str, int], tuple[int, ...]] = {
    **{("decode", batch): (0, 1, 8, 32) for batch in (32, 64, 128, 256)},
    ("decode", 1): (0, 1),
    ("decode", 8): (0, 1, 8),
    ("prefill", 8): (0, 1, 8),
}
#: Least throughput over no LoRA by step and adapters, of docs/performance.md.
GOALS: Mapping[str, Mapping[int, float]] = {
    "decode": {0: 0.995, 1: 0.97, 8: 0.94},
    "prefill": {0: 0.995, 1: 0.975, 8: 0.975},
}
#: Largest error of a row's logits, over that of the merged model in the same dtype; in a tiny
#: model's float32 sums are in another order than with the merged weight.
ROUNDING, TINY_ROUNDING = 4.0, 10.0
STEP_TOKENS = {"decode": 1, "prefill": 1024}
PROMPT, NEW, GENERATED = 128, 32, (0, 1, 8)
PEFT_BLOCKS = 5  # of the mixed batch, which is far from all others


@dataclass
class Sizes:
    layers: int = 4
    rank: int = 16
    tiny: bool = False

    @classmethod
    def of(cls, context: Context) -> Sizes:
        return cls(1, 4, tiny=True) if context.tiny else cls()


def parse(arguments: Sequence[str]) -> Sizes:
    """The sizes that a script's `--layers` and `--rank` ask for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=Sizes.layers)
    parser.add_argument("--rank", type=int, default=Sizes.rank)
    return Sizes(**vars(parser.parse_args(arguments)))


def config_of(layers: int, *, tiny: bool = False) -> LlamaConfig:
    """Llama-3-8B with fewer layers and as much less vocabulary."""
    hidden, inner, heads, keys, positions = 4096, 14336, 32, 8, 8192
    vocabulary = 128256 * layers // 32
    if tiny:
        hidden, inner, heads, keys, positions, vocabulary = 64, 96, 4, 2, 64, 128
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        rope_theta=500000.0,
    )


def build_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def make_adapter(model: LlamaForCausalLM, folder: Path, rank: int, seed: int) -> None:
    """Have PEFT save an adapter with α = r."""
    save_adapter(model, folder, rank, list(TARGETS), std=0.02, seed=seed)


def prepared(
    sizes: Sizes,
    device: torch.device,
    folder: str | Path,
    *,
    count: int,
    tiny: bool = False,
    pins: str | None = None,
) -> tuple[LlamaForCausalLM, lorafx.CompiledModel, dict[str, str]]:
    """The model, lorafx's compiled copy of it, and the paths of `count` adapters. `pins` is the
    strategy of all linears; without it lorafx plans."""
    tiny = tiny or sizes.tiny
    dtype = torch.float32 if tiny else torch.bfloat16
    model = build_model(config_of(sizes.layers, tiny=tiny), device, dtype)
    paths = {f"a{index}": f"{folder}/a{index}" for index in range(count)}
    config = lorafx.LoraConfig(
        target_modules=list(TARGETS), max_adapters=count, max_rank=sizes.rank
    )
    plan = dict.fromkeys(linears_of(model), pins) if pins else {}
    # What serves calls without an adapter once `warmup` has run.
    options = {"lowering": "triton", "plan": plan, "base_graphs": True}
    cm = lorafx.compile(copy.deepcopy(model), config, options=options)
    for seed, (name, path) in enumerate(paths.items()):
        make_adapter(model, Path(path), sizes.rank, seed)
        cm.load_adapter(path, name)
    return model, cm, paths


def linears_of(model: LlamaForCausalLM) -> dict[str, nn.Linear]:
    """Those of the layers, by path."""
    named = model.named_modules()
    return {path: m for path, m in named if path.rpartition(".")[2] in TARGETS}


def floor_of(model: LlamaForCausalLM, rank: int, distinct: int) -> float:
    """Bytes of a decode step with D adapters over the base's."""
    linears = linears_of(model).values()
    weights = sum(linear.weight.numel() for linear in (*linears, model.lm_head))
    return 1 + distinct * factor_elements(linears, rank) / weights


def run_step(context: Context, *, kind: str, batch: int, pins: str | None = None) -> None:
    """Job: one kind of step."""
    sizes, mixes, tokens = Sizes.of(context), MIXES[kind, batch], STEP_TOKENS[kind]
    if context.tiny:
        batch, tokens, mixes = 3, min(tokens, 2), (0, 1, 2)

    def measured(case: str) -> Rows:
        with tempfile.TemporaryDirectory() as folder:
            model, cm, paths = prepared(sizes, context.device, folder, count=max(mixes), pins=pins)
            ids = torch.randint(model.config.vocab_size, (batch, tokens), device=context.device)
            call, calls = {"input_ids": ids, "use_cache": False}, {}
            about: dict[str, dict[str, Any]] = {}
            for distinct in mixes:
                name, names = f"lorafx D={distinct}", names_of(batch, distinct)
                calls[name] = partial(cm, **call, adapter_names=names)
                found = errors(model, paths, calls[name]().logits, ids, names)
                error = max(got / max(own, 1e-6) for got, own in found)
                if not error < (TINY_ROUNDING if context.tiny else ROUNDING):
                    raise RuntimeError(f"{case} D={distinct}: error {error:.1f}")
                floor = floor_of(model, sizes.rank, distinct) if kind == "decode" else 1.0
                about[name] = {"floor": floor, "goal": GOALS[kind].get(distinct)}
                about[name]["error_over_rounding"] = error
            meter = gpu_protocol.Meter(context.device, seconds=0.02)
            # Static shapes: the strongest base. lorafx's graphs serve any batch, as users have it.
            backend = "eager" if context.tiny else "inductor"
            base = torch.compile(copy.deepcopy(model), dynamic=False, backend=backend)
            case = f"{case}, {sizes.layers} layers, r={sizes.rank}"
            rows = meter.compare_steps(case, partial(base, **call), calls)
            return [row | about.get(row["arm"], {}) for row in rows]

    key = f"{kind} [{batch}, {tokens}]"
    context.measure({key: key}, measured)


# --- generation ---


def tokens_of(model: Any, ids: Tensor, new: int, **more: Any) -> Tensor:
    """The new tokens of greedy generation with a static cache, (rows, new)."""
    settings = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
    settings |= {"cache_implementation": "static", "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, **settings, **more)[:, ids.shape[1] :]


def agreement(got: Tensor, want: Tensor) -> float:
    """The share of tokens up to which rows agree: after the first other token all may be others."""
    return float((got == want).long().cumprod(1).float().mean())


def run_generate(context: Context, *, batch: int) -> None:
    """Job: one batch size."""
    sizes, prompt, new, count = Sizes.of(context), PROMPT, NEW, 8
    if context.tiny:
        batch, prompt, new, count = min(batch, 2), 2, 2, 2
    cuda_graphs = torch._inductor.config.patch({"triton.cudagraphs": not context.tiny})

    def measured(key: str) -> Rows:
        with tempfile.TemporaryDirectory() as folder, cuda_graphs:
            model, cm, paths = prepared(sizes, context.device, folder, count=count)
            merged = PeftModel.from_pretrained(copy.deepcopy(model), paths["a0"])
            models = model, cm, merged.merge_and_unload(), peft_mixed(model, paths)
            ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=context.device)
            return measure_generate(context, key, models, ids, new)

    key = f"generate [{batch}, {prompt}] + {new}"
    context.measure({key: key}, measured)


def measure_generate(
    context: Context, case: str, models: tuple[Any, Any, Any, Any], ids: Tensor, new: int
) -> list[dict[str, Any]]:
    """Rows of results of one batch.

    Raises:
        RuntimeError: a mix captured a graph that warming up had not, or lorafx's tokens are others
            than the merged model's where numbers are float32.
    """
    (model, cm, merged, peft), batch = models, ids.shape[0]
    mixes = sorted({min(distinct, batch, len(cm.adapters)) for distinct in GENERATED})
    calls = {"A/A": partial(tokens_of, model, ids, new)}
    for distinct in mixes:
        names = names_of(batch, distinct)
        calls[f"lorafx D={distinct}"] = partial(tokens_of, cm, ids, new, adapter_names=names)
    calls["PEFT merged"] = partial(tokens_of, merged, ids, new)
    eager = f"PEFT adapter_names D={mixes[-1]}"
    most = [name or "__base__" for name in names_of(batch, mixes[-1])]
    calls[eager] = partial(tokens_of, peft, ids, new, adapter_names=most, disable_compile=True)
    for _ in range(1 if context.tiny else 3):
        warm = {name: call() for name, call in calls.items()}
    graphs = cm.recompiles
    got = {name: calls[name]() for name in calls if name.startswith("lorafx")}
    if cm.recompiles != graphs:
        raise RuntimeError(f"{cm.recompiles - graphs} graphs were captured for mixes seen before")
    same = {"lorafx D=0": "A/A", "lorafx D=1": "PEFT merged"}
    agreed = {name: agreement(got[name], warm[other]) for name, other in same.items()}
    if context.tiny and min(agreed.values()) < 1:
        raise RuntimeError(f"other tokens than the merged model's: {agreed}")

    def clock(call: Callable[[], Tensor], seconds: float) -> float:
        """transformers waits for the tokens of each step on the host."""
        meter.wait()
        start = time.perf_counter()
        call()
        meter.wait()
        return time.perf_counter() - start

    meter, base, slow = gpu_protocol.Meter(context.device), calls.pop("A/A"), calls.pop(eager)
    case = f"{case}, {model.config.num_hidden_layers} layers"
    rows = meter.compare(case, base, calls, clock)
    rows += meter.compare(case, base, {eager: slow}, clock, PEFT_BLOCKS)[1:]
    for row in rows:
        row["agreement"] = agreed.get(row["arm"])
        row["tokens_per_second"] = batch * new / row["milliseconds"] * 1e3
    return rows
