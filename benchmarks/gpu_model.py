"""A Llama-3-8B-shaped model on a GPU: what a user sees, and whole steps. Jobs of the queue.

Layers of Llama-3-8B's sizes (fewer of them, the vocabulary in proportion), LoRA on all linears of
the layers, bf16, random weights.

run_step    every arm is a CUDA graph of one step, captured here; a mix is set by a call outside of
            the graph, which writes the slots that the graph reads. Base: the same model under
            torch.compile. Decode is [64, 1] and prefill [8, 1024], without a key/value cache, which
            would add the same to both
run_user    eight requests of eight adapters, 128 tokens and 32 new ones, greedily. Seconds until
            the first token and tokens a second, as a user sees them one after the other in
            transformers, PEFT and lorafx as it is by default. Then static caches, compiled and with
            CUDA graphs, each `generate` timed on the host over that of transformers
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gpu_protocol
import torch
import torch._inductor.config
from cpu_mixed import RANK, TARGETS, build_model, peft_mixed, save_adapters
from gpu_job import Context, Rows, ratios
from protocol import errors, names_of
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import lorafx
from lorafx.kernels.cost.roofline import factor_elements

#: Of each kind of step: requests, tokens of each, and the distinct adapters of the mixes.
STEPS = {"decode": (64, 1, (0, 1, 8, 32)), "prefill": (8, 1024, (0, 1, 8))}
#: Most time over the base's by step and adapters, of docs/performance.md.
GOALS: Mapping[str, Mapping[int, float]] = {
    "decode": {0: 1.005, 1: 1.03, 8: 1.06, 32: 1.25},
    "prefill": {0: 1.005, 1: 1.026, 8: 1.026},
}
#: Largest error of a row's logits, over that of the merged model in the same dtype; in a tiny
#: model's float32 sums are in another order than with the merged weight.
ROUNDING, TINY_ROUNDING = 4.0, 10.0
REQUESTS, PROMPT, NEW = 8, 128, 32
LAYERS = 4
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 128}


def made(
    context: Context, folder: str, count: int, layers: int = LAYERS
) -> tuple[LlamaForCausalLM, dict[str, str]]:
    """Llama-3-8B with fewer layers and as small a vocabulary, and paths of `count` adapters."""
    with torch.device(context.device):
        if context.tiny:
            model = build_model(1, torch.float32, **TINY)
        else:
            vocabulary = 128256 * layers // 32
            model = build_model(layers, torch.bfloat16, **SIZES, vocab_size=vocabulary)
    return model, save_adapters(model, Path(folder), count)


def compiled(model: LlamaForCausalLM, paths: dict[str, str]) -> lorafx.CompiledModel:
    """lorafx's compiled copy. Graphs of the base serve calls without an adapter, as they do once
    `warmup` has run."""
    options = {"lowering": "triton", "base_graphs": True, "start": "compiled"}
    return lorafx.compile(copy.deepcopy(model), paths, options=options)


def floor_of(model: LlamaForCausalLM, distinct: int) -> float:
    """Bytes of a decode step with D adapters over the base's."""
    named = model.named_modules()
    linears = {p: m for p, m in named if isinstance(m, nn.Linear) and p.split(".")[-1] in TARGETS}
    weights = sum(linear.weight.numel() for linear in (*linears.values(), model.lm_head))
    return 1 + distinct * factor_elements(linears.values(), RANK) / weights


def run_step(context: Context, *, phase: str) -> None:
    """Job: one kind of step."""
    batch, tokens, mixes = STEPS[phase]
    if context.tiny:
        batch, tokens, mixes = 3, min(tokens, 2), (0, 1, 2)

    def measured(key: str) -> Rows:
        with tempfile.TemporaryDirectory() as folder:
            model, paths = made(context, folder, max(mixes))
            cm = compiled(model, paths)
            ids = torch.randint(model.config.vocab_size, (batch, tokens), device=context.device)
            call, calls = {"input_ids": ids, "use_cache": False}, {}
            about: dict[str, dict[str, Any]] = {}
            for distinct in mixes:
                name, names = f"lorafx D={distinct}", names_of(batch, distinct)
                calls[name] = partial(cm, **call, adapter_names=names)
                found = errors(model, paths, calls[name]().logits, ids, names)
                error = max(got / max(own, 1e-6) for got, own in found)
                if not error < (TINY_ROUNDING if context.tiny else ROUNDING):
                    raise RuntimeError(f"{key} D={distinct}: error {error:.1f}")
                floor = floor_of(model, distinct) if phase == "decode" else 1.0
                about[name] = {"floor": floor, "goal": GOALS[phase].get(distinct)}
                about[name]["error_over_rounding"] = error
            meter = gpu_protocol.Meter(context.device, seconds=0.02)
            # Static shapes: the strongest base. lorafx's graphs serve any batch, as users have it.
            backend = "eager" if context.tiny else "inductor"
            base = torch.compile(copy.deepcopy(model), dynamic=False, backend=backend)
            case = f"{key}, {model.config.num_hidden_layers} layers, r={RANK}"
            rows = meter.compare_steps(case, partial(base, **call), calls)
            return [row | about.get(row["arm"], {}) for row in rows]

    key = f"{phase} [{batch}, {tokens}]"
    context.measure({key: key}, measured)


# --- generation ---


def tokens_of(model: Any, ids: Tensor, new: int, **more: Any) -> Tensor:
    """The new tokens of greedy generation, (rows, new)."""
    settings = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
    settings |= {"pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, **settings, **more)[:, ids.shape[1] :]


def agreement(got: Tensor, want: Tensor) -> float:
    """The share of tokens up to which rows agree: after the first other token all may be others."""
    return float((got == want).long().cumprod(1).float().mean())


def run_user(context: Context) -> None:
    """Job: nothing but torch is warm.

    Raises:
        RuntimeError: a mix captured a graph that warming up had not, or lorafx's tokens are others
            than PEFT's where numbers are float32.
    """
    batch, prompt, new = (2, 2, 2) if context.tiny else (REQUESTS, PROMPT, NEW)
    meter = gpu_protocol.Meter(context.device)
    cuda_graphs = torch._inductor.config.patch({"triton.cudagraphs": not context.tiny})

    def clock(call: Callable[[], Tensor], seconds: float) -> float:
        """transformers waits for the tokens of each step on the host."""
        meter.wait()
        start = time.perf_counter()
        call()
        meter.wait()
        return time.perf_counter() - start

    def measured(key: str) -> Rows:
        rows, told = list[dict[str, Any]](), dict[str, Any]()

        def seen(what: str, call: Callable[[], Any], tokens: int = 0) -> Any:
            seconds = clock(lambda: told.update({what: call()}), 0.0)
            rows.append({"arm": what, "seconds": seconds, "tokens_per_second": tokens / seconds})
            return told[what]

        def generated(what: str, model: Any, times: int, **more: Any) -> None:
            seen(f"{what}: first token", partial(tokens_of, model, ids, 1, **more))
            for _ in range(times):
                call = partial(tokens_of, model, ids, new, **more)
                seen(f"{what}: tokens", call, batch * new)

        with tempfile.TemporaryDirectory() as folder:
            model, paths = made(context, folder, batch, layers=2 * LAYERS)
            ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=context.device)
            names = names_of(batch, batch)
            generated("transformers, no adapter", model, 1)
            peft = seen("PEFT: set-up", partial(peft_mixed, model, paths))
            generated("PEFT", peft, 2, adapter_names=names)
            cm = seen("lorafx: set-up", partial(lorafx.compile, copy.deepcopy(model), paths))
            generated("lorafx", cm, 4, adapter_names=names)
            agreed = agreement(told["lorafx: tokens"], told["PEFT: tokens"])
            if context.tiny and agreed < 1:
                raise RuntimeError(f"other tokens than PEFT's: {agreed}")
            for row in rows:
                row["agreement"] = agreed
            del peft, cm
            with cuda_graphs:
                cm = compiled(model, paths)
                static = partial(tokens_of, ids=ids, new=new, cache_implementation="static")
                base, calls = partial(static, model), dict[str, Callable[[], Tensor]]()
                for distinct in sorted({0, 1, batch}):
                    given = names_of(batch, distinct)
                    calls[f"lorafx D={distinct}"] = partial(static, cm, adapter_names=given)
                for call in (base, *calls.values()) * (1 if context.tiny else 3):
                    call()
                graphs = cm.recompiles
                steady = meter.compare(f"static, {key}", base, calls, clock)
                if cm.recompiles != graphs:
                    raise RuntimeError(f"{cm.recompiles - graphs} graphs were captured for mixes")
        more = [{"tokens_per_second": batch * new / row["milliseconds"] * 1e3} for row in steady]
        return [*rows, *(row | rate for row, rate in zip(steady, more, strict=True))]

    def summary(rows: Rows) -> str:
        first = [row for row in rows if row["arm"].endswith("first token")]
        told = ", ".join(f"{row['arm']} {row['seconds']:.2f} s" for row in first)
        return f"{told}; static: {ratios([row for row in rows if 'median' in row])}"

    key = f"generate [{batch}, {prompt}] + {new}"
    context.measure({key: key}, measured, summary)
