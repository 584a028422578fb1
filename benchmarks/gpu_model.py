"""A whole step of a Llama-3-8B-shaped model on a GPU: lorafx with 0 to 32 adapters over the base.

    python benchmarks/gpu_model.py [--minutes 8] [--layers 4] [--rank 16]

Layers of Llama-3-8B's sizes (fewer of them, the vocabulary in proportion), LoRA on all linears of
the layers, bf16, random weights. Base: the same model under torch.compile. Every arm is a CUDA
graph of one step, captured here; a mix is set by a call outside of the graph, which writes the
slots that the graph reads. Decode is [batch, 1] and prefill [8, 1024], without a key/value cache: a
cache would add the same to both. `--self-check` runs a tiny model on the CPU, the kernels in
Triton's interpreter, and measures nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_protocol
import protocol
import torch
from gpu_job import Context
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: (name, batch, tokens, adapters of the mixes), the most telling first
STEPS = (
    ("decode", 64, 1, (0, 1, 8, 32)),
    ("decode", 32, 1, (0, 1, 8, 32)),
    ("prefill", 8, 1024, (0, 1, 8)),
    ("decode", 1, 1, (0, 1)),
    ("decode", 8, 1, (0, 1, 8)),
    ("decode", 128, 1, (0, 1, 8, 32)),
    ("decode", 256, 1, (0, 1, 8, 32)),
)
#: Least throughput over no LoRA by (step, adapters), of docs/performance.md: goal, stretch.
GOALS = {
    ("decode", 0): (0.995, 1.0),
    ("decode", 1): (0.97, 0.985),
    ("decode", 8): (0.94, 0.955),
    ("prefill", 0): (0.995, 1.0),
    ("prefill", 1): (0.975, 0.99),
    ("prefill", 8): (0.975, 0.99),
}
#: Largest error of a row's logits, over that of the merged model in the same dtype.
ROUNDING = 4.0


def config_of(layers: int, *, tiny: bool = False) -> LlamaConfig:
    """Llama-3-8B with fewer layers and as much less vocabulary."""
    if tiny:
        return LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            max_position_embeddings=64,
        )
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256 * layers // 32,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )


def build_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


Factors = dict[str, tuple[Tensor, Tensor]]  # module path -> A (r, K), B (N, r)


def make_adapter(model: LlamaForCausalLM, folder: Path, rank: int, seed: int) -> Factors:
    """Write an adapter in PEFT's format with α = r, and return its factors."""
    generator = torch.Generator().manual_seed(seed)
    factors: Factors = {}
    tensors = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] not in TARGETS:
            continue
        N, K = module.weight.shape
        A = torch.randn(rank, K, generator=generator) * K**-0.5
        B = torch.randn(N, rank, generator=generator) * 0.1 * rank**-0.5
        factors[path] = A.to(model.dtype), B.to(model.dtype)
        for letter, factor in zip("AB", factors[path], strict=True):
            tensors[f"base_model.model.{path}.lora_{letter}.weight"] = factor
    folder.mkdir(parents=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return factors


@torch.no_grad()
def merged(model: LlamaForCausalLM, factors: Factors | None) -> LlamaForCausalLM:
    """A float64 copy with W + B A."""
    exact = copy.deepcopy(model).double()
    for path, (A, B) in (factors or {}).items():
        weight = exact.get_submodule(path).weight
        weight += B.to(weight) @ A.to(weight)
    return exact


def floor_of(config: LlamaConfig, rank: int, distinct: int) -> float:
    """Bytes of a decode step with D adapters over the base's."""
    h, m = config.hidden_size, config.intermediate_size
    kv = h // config.num_attention_heads * config.num_key_value_heads
    shapes = [(h, h), (h, kv), (h, kv), (h, h), (h, m), (h, m), (m, h)]
    layer = sum(K * N for K, N in shapes)
    factors = sum(K + N for K, N in shapes)
    weights = config.num_hidden_layers * layer + config.vocab_size * h
    return 1 + distinct * rank * config.num_hidden_layers * factors / weights


def names_of(batch: int, distinct: int) -> list[str | None]:
    """The adapter of each request: D of them in turn; the base where D is 0."""
    return [f"a{row % distinct}" if distinct else None for row in range(batch)]


def errors(
    model: LlamaForCausalLM,
    adapters: Sequence[Factors],
    serve: Callable[[Sequence[str | None]], Tensor],
    ids: Tensor,
    distinct: int,
) -> float:
    """Worst error of the first and last row, over that of the merged model in its own dtype."""
    names = names_of(ids.shape[0], distinct)
    got = serve(names).double()
    worst = 0.0
    for row in {0, ids.shape[0] - 1}:
        factors = adapters[row % distinct] if distinct else None
        exact = merged(model, factors)
        want = exact(input_ids=ids[row : row + 1], use_cache=False).logits[0]
        own = exact.to(model.dtype)(input_ids=ids[row : row + 1], use_cache=False).logits[0]
        allowed = max(float((own.double() - want).abs().max()), 1e-6)
        worst = max(worst, float((got[row] - want).abs().max()) / allowed)
    return worst


@dataclass(frozen=True)
class StepArm:
    """A captured step. `prepare` sets the mix that the next replays serve."""

    graph: Callable[[], None]
    prepare: Callable[[], object]
    copies: int = 1

    def __call__(self) -> None:
        self.graph()


def step_time(meter: gpu_protocol.Meter, arm: StepArm, seconds: float) -> float:
    """Seconds of one replay, after the arm's mix was set."""
    arm.prepare()
    return meter.time(arm, seconds)


def measure_step(
    case: tuple[str, int, int, Sequence[int]],
    models: tuple[LlamaForCausalLM, Callable[..., Any], lorafx.CompiledModel],
    adapters: Sequence[Factors],
    options: argparse.Namespace,
) -> list[dict[str, object]]:
    """Rows of results of one kind of step."""
    kind, batch, tokens, mixes = case
    model, base, cm = models
    config = model.config
    ids = torch.randint(config.vocab_size, (batch, tokens), device=model.device)

    def run_base() -> Tensor:
        return base(input_ids=ids, use_cache=False).logits

    def serve(names: Sequence[str | None]) -> Tensor:
        return cm(input_ids=ids, use_cache=False, adapter_names=names).logits

    meter = gpu_protocol.Meter(model.device, options.blocks, options.seconds)
    arms, worst, counted = {}, {}, {}
    for distinct in mixes:
        names = names_of(batch, distinct)

        def call(names: Sequence[str | None] = names) -> Tensor:
            return serve(names)

        name = f"lorafx D={distinct}"
        worst[name] = errors(model, adapters, serve, ids, distinct)
        if not worst[name] < ROUNDING:
            raise RuntimeError(f"{kind} [{batch}, {tokens}] {name}: error {worst[name]:.1f}")
        counted[name] = len(meter.launches(call))
        arms[name] = StepArm(meter.arm([call]), call)
    counted["A/A"] = len(meter.launches(run_base))
    start = gpu_protocol.clocks()
    base_arm = StepArm(meter.arm([run_base]), lambda: None)
    ratios = meter.compare(base_arm, arms, partial(step_time, meter))
    label = f"{kind} [{batch}, {tokens}], {config.num_hidden_layers} layers, r={options.rank}"
    print(f"\n{label}; {counted['A/A']} launches of the base")
    rows = []
    for ratio in ratios:
        distinct = int(ratio.arm.partition("=")[2] or 0)
        floor = floor_of(config, options.rank, distinct) if kind == "decode" else 1.0
        goal, stretch = GOALS.get((kind, distinct), (None, None))
        verdict = ""
        if goal is not None and ratio.arm != "A/A":
            # A claim needs the bound of the interval.
            reached = "reached" if 1 / ratio.high >= goal else "not reached"
            verdict = f"; throughput {1 / ratio.median:.3f}, goal {goal} {reached}"
        launched = counted[ratio.arm]
        print(f"  {ratio.arm:14s} {ratio}; {ratio.median / floor:.3f} of the floor{verdict}")
        rows.append(
            protocol.as_row(label, ratio)
            | {"floor": floor, "launches": launched, "goal": goal, "stretch": stretch}
            | {"error_over_rounding": worst.get(ratio.arm)}
            | {"clocks before": start, "clocks after": gpu_protocol.clocks()}
        )
    return rows


def prepared(
    options: argparse.Namespace,
    device: torch.device,
    folder: Path,
    *,
    tiny: bool,
    count: int,
    pins: Mapping[str, str] | None = None,
) -> tuple[LlamaForCausalLM, lorafx.CompiledModel, list[Factors]]:
    """The model, lorafx's compiled copy of it, and the factors of the adapters.

    `pins` gives linears a strategy by their names in the layer; lorafx plans the others.
    """
    dtype = torch.float32 if tiny else torch.bfloat16
    model = build_model(config_of(options.layers, tiny=tiny), device, dtype)
    paths = {f"a{index}": folder / f"a{index}" for index in range(count)}
    adapters = [
        make_adapter(model, path, options.rank, seed) for seed, path in enumerate(paths.values())
    ]
    config = lorafx.LoraConfig(
        target_modules=list(TARGETS), max_adapters=count, max_rank=options.rank
    )
    names = {path: path.rpartition(".")[2] for path, _ in model.named_modules()}
    plan = {path: pins[name] for path, name in names.items() if pins and name in pins}
    # What serves calls without an adapter once `warmup` has run.
    settings = {"lowering": "triton", "plan": plan, "base_graphs": True}
    cm = lorafx.compile(copy.deepcopy(model), config, options=settings)
    for name, path in paths.items():
        cm.load_adapter(path, name)
    return model, cm, adapters


def self_check(options: argparse.Namespace) -> None:
    """A tiny model on the CPU through the same code, but for graphs and clocks."""
    options.layers, options.rank = 2, 4
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model, cm, adapters = prepared(
            options, torch.device("cpu"), Path(folder), tiny=True, count=2
        )
        ids = torch.randint(model.config.vocab_size, (3, 1))

        def serve(names: Sequence[str | None]) -> Tensor:
            return cm(input_ids=ids, use_cache=False, adapter_names=names).logits

        for distinct in (0, 1, 2):
            error = errors(model, adapters, serve, ids, distinct)
            print(f"tiny decode [3, 1] D={distinct}: error over rounding {error:.2f}")
            if not error < 10:  # float32 sums in another order than with the merged weight
                raise RuntimeError(f"D={distinct}: error {error:.1f} of rounding")
        print(f"floor at D=8: {floor_of(config_of(8), 16, 8):.3f}; nothing was measured")


def run_step(context: Context, *, place: int, pins: Mapping[str, str] | None = None) -> None:
    """Job: one of STEPS, with the strategies of `pins`."""
    options = parse([])
    kind, batch, tokens, mixes = STEPS[place]
    if context.tiny:
        options.layers, options.rank = 1, 4
        batch, tokens, mixes = 3, min(tokens, 2), (0, 1, 2)
    key = f"{kind} [{batch}, {tokens}]"
    if not context.order([key]):
        return
    with context.case(key), tempfile.TemporaryDirectory() as folder:
        settings = {"tiny": context.tiny, "count": max(1, *mixes), "pins": pins}
        model, cm, adapters = prepared(options, context.device, Path(folder), **settings)
        backend = "eager" if context.tiny else "inductor"
        base = torch.compile(copy.deepcopy(model), dynamic=False, backend=backend)
        case = (kind, batch, tokens, mixes)
        context.add(key, measure_step(case, (model, base, cm), adapters, options))
        rows = context.part.rows
        ratios = [f"{row['arm'].split()[-1]} {row['median']:.3f}" for row in rows]
        context.summarise(", ".join(ratios))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=0.02, help="of one timing")
    parser.add_argument("--step", type=int, action="append", help="of STEPS, by place; all if none")
    parser.add_argument("--self-check", action="store_true", help="on the CPU; measures nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_model.json"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.self_check:
        self_check(options)
        return
    device = gpu_protocol.require_gpu("gpu_model.py")
    budget = gpu_protocol.Budget(options.minutes)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model, cm, adapters = prepared(options, device, Path(folder), tiny=False, count=32)
        # Static shapes: the strongest base. lorafx's graphs serve any batch, as users have them.
        base = torch.compile(copy.deepcopy(model), dynamic=False)
        for case in [STEPS[place] for place in options.step or range(len(STEPS))]:
            label = f"{case[0]} [{case[1]}, {case[2]}]"
            if not budget.fits(label):
                continue
            start = time.monotonic()
            rows += measure_step(case, (model, base, cm), adapters, options)
            budget.took(time.monotonic() - start)
    if budget.left_out:
        print(f"\nleft out for want of time: {'; '.join(budget.left_out)}")
    title = f"time over the compiled base, {options.layers} layers of Llama-3-8B, r={options.rank}"
    protocol.save(options.out, title, rows, lambda: gpu_protocol.gpu_machine(device))


if __name__ == "__main__":
    main()
