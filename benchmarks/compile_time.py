"""Time of the first call, by depth: from cold caches, and again in a process that finds them warm.

Each start is a process of its own that builds a random model, loads an adapter of rank 16,
compiles, and makes one call of decode form [8, 1] in which every second request uses the adapter.
The time is that of the call: capture, passes, Inductor, C++ (imports, building the model and
loading the adapter are not; neither is the header that Inductor precompiles once a machine).
Cases with a cache make two calls: a prompt of five tokens, and one token more. The
whole call is in seconds of wall time and of CPU time, that of the compilers that it starts apart;
its phases are in CPU seconds, which other work on the machine changes least. Step time with
outlined layers is compared to that without in one process.

    python benchmarks/compile_time.py [--quick] [--case NAME] [--depth N]

`--case` and `--depth` (more than one of each is fine) measure those alone and keep the others' rows
in the results.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from first_answer import SIZES
from protocol import in_process, rows_of, save, save_adapter

#: Cases that write into a cache, and its kind: the prompt, and one token more, each of which has a
#: graph.
CACHED = {
    "Llama, cache": "dynamic",
    "Llama, static cache": "static",
    "Llama, cache, reference": "dynamic",
    "Llama, static cache, reference": "static",
}
#: Cases that run in plain aten: what is left is what stands before Inductor.
REFERENCE = frozenset(
    {
        "Llama, dynamic, reference",
        "Llama, cache, reference",
        "Llama, static cache, reference",
    }
)
#: name: (family, dynamic shapes, outlined, depths, depths that are also started again)
CASES: dict[str, tuple[str, bool, bool, tuple[int, ...], tuple[int, ...]]] = {
    "Llama, dynamic": ("llama", True, True, (2, 8, 32), (2, 32)),
    "Llama, static": ("llama", False, True, (2, 8, 32), (32,)),
    "Llama, dynamic, not outlined": ("llama", True, False, (32,), ()),
    "Llama, dynamic, reference": ("llama", True, True, (2, 8, 32), ()),
    "Llama, cache": ("llama", True, True, (2, 32), ()),
    "Llama, static cache": ("llama", True, True, (2, 32), ()),
    "Llama, cache, reference": ("llama", True, True, (2, 8, 32), ()),
    "Llama, static cache, reference": ("llama", True, True, (2, 8, 32), ()),
    "Qwen3-Next, static": ("qwen3_next", False, True, (2, 8, 32), (32,)),
    "Qwen3-Next, dynamic": ("qwen3_next", True, True, (2, 8, 32), ()),
    "Qwen3-MoE, dynamic": ("qwen3_moe", True, True, (2, 32), ()),
}
QUICK = 8  # layers at most of a quick run
STEP_DEPTH = 8
ROWS = 8
PROMPT = 5  # tokens


def llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers))


def qwen3_next(layers: int) -> Any:
    """Gated delta nets and attention by turns."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES,
            num_hidden_layers=layers,
            layer_types=["linear_attention", "full_attention"] * (layers // 2),
            head_dim=64,
            linear_num_key_heads=4,
            linear_num_value_heads=8,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            mlp_only_layers=list(range(layers)),
        )
    )


def qwen3_moe(layers: int) -> Any:
    """Eight experts, of which each token takes two."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            moe_intermediate_size=256,
            num_experts=8,
            num_experts_per_tok=2,
            num_hidden_layers=layers,
            head_dim=64,
        )
    )


#: Constructor, and what PEFT adapts. (It takes Qwen3-Next's MLPs for experts, whose LoRA is on bare
#: parameters.)
FAMILIES: dict[str, tuple[Callable[[int], Any], dict[str, Any]]] = {
    "llama": (llama, {"targets": r".*layers.*_proj"}),
    "qwen3_next": (qwen3_next, {"targets": r".*_attn\.\w+_proj\w*"}),
    "qwen3_moe": (
        qwen3_moe,
        {
            "targets": r".*_attn\.\w+_proj",
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}


def start(
    family: str,
    layers: int,
    dynamic: bool,
    outlined: bool,
    lowering: str = "auto",
    cached: str | None = None,
    **more_options: object,
) -> tuple[Any, Callable[[], Any]]:
    """A compiled model that has not run yet, and its first and every further call."""
    import torch

    import lorafx

    torch.manual_seed(0)
    build, adapted = FAMILIES[family]
    model = build(layers).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder), 16, **adapted)
        options = {
            "passes": {"outline": outlined},
            "lowering": lowering,
            "start": "compiled",
            **more_options,
        }
        cm = lorafx.compile(model, {"a": folder}, dynamic=dynamic, options=options)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, 1))
    names = ["a", None] * (ROWS // 2)
    if cached:
        from transformers import DynamicCache, StaticCache

        prompt = torch.randint(0, model.config.vocab_size, (ROWS, PROMPT))

        def prompt_and_step() -> Any:
            if cached == "static":
                past: Any = StaticCache(config=model.config, max_cache_len=4 * PROMPT)
            else:
                past = DynamicCache(config=model.config)
            for part in (prompt, ids):
                logits = cm(input_ids=part, past_key_values=past, adapter_names=names).logits
            return logits

        return cm, prompt_and_step
    return cm, lambda: cm(input_ids=ids, use_cache=False, adapter_names=names).logits


@contextmanager
def phases_in_cpu_seconds() -> Iterator[None]:
    """Have Dynamo and the passes time themselves by the CPU seconds of this process."""
    from torch._dynamo import utils

    from lorafx import model_passes
    from lorafx.capture import driver

    clocks = {"time_ns": time.process_time_ns, "perf_counter": time.process_time}
    clock = SimpleNamespace(**{**vars(time), **clocks})
    timing: tuple[Any, ...] = (utils, model_passes, driver)
    for module in timing:
        module.time = clock
    try:
        yield
    finally:
        for module in timing:
            module.time = time


def spent(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of a call, its CPU seconds in this process, and those of compilers that it starts."""
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    used = [resource.getrusage(item) for item in who]
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    cpu, compilers = (
        now.ru_utime + now.ru_stime - was.ru_utime - was.ru_stime
        for now, was in zip(map(resource.getrusage, who), used, strict=True)
    )
    return {"seconds": seconds, "cpu": cpu, "compilers": compilers}


def first_call(
    family: str,
    layers: int,
    dynamic: bool,
    outlined: bool,
    lowering: str,
    cached: str | None,
) -> dict[str, object]:
    """One start: seconds of the first call, and CPU seconds of it and of its phases."""
    from torch._dynamo.utils import compile_times, counters

    cm, call = start(family, layers, dynamic, outlined, lowering, cached)
    with phases_in_cpu_seconds():
        used = spent(call)
    names, times = compile_times(repr="csv", aggregate=True)
    parts = dict(zip(names, (float(value) for value in times), strict=True))
    records = cm._session.backend.records
    assert len(records) == (1 if cached is None else 2)
    passes: dict[str, float] = {}
    for report in (report for record in records for report in record.passes):
        passes[report.name] = passes.get(report.name, 0.0) + report.seconds
    return {
        **used,
        "tracing": parts.get("bytecode_tracing", 0.0),
        "guards": parts.get("build_guards", 0.0),
        "aot": parts.get("create_aot_dispatcher_function", 0.0),
        "metadata": parts.get("aot_collect_metadata", 0.0),
        "passes": sum(passes.values()),
        "inductor": parts.get("compile_fx_inner", 0.0),
        "by_pass": passes,
        "bodies": [len(told.paths) for record in records for told in record.outlined],
        "cache_hits": counters["inductor"]["fxgraph_cache_hit"],
    }


def precompile_header() -> None:
    """What Inductor makes once a machine, whatever its cache folder."""
    import torch

    torch.compile(torch.sin)(torch.ones(64))


def step_time(layers: int, blocks: int) -> list[dict[str, object]]:
    """Steps of outlined layers over those of the same model as one graph."""
    calls = [start("llama", layers, True, outlined)[1] for outlined in (False, True)]
    plain, outlined = (call() for call in calls)
    assert (plain - outlined).abs().max() <= 1e-5 * plain.abs().max()
    case, arms = f"step, Llama, {layers} layers", {"outlined": calls[1]}
    return rows_of(case, calls[0], arms, blocks=blocks, seconds=0.1)


def run_case(
    name: str, quick: bool, chosen: list[int] | None, folder: Path
) -> list[dict[str, object]]:
    family, dynamic, outlined, depths, again = CASES[name]
    lowering = "reference" if name in REFERENCE else "auto"
    rows: list[dict[str, object]] = []
    for layers in chosen or [depth for depth in depths if not quick or depth <= QUICK]:
        cache = Path(tempfile.mkdtemp(dir=folder))  # a path that g++ can read: no spaces
        for state in ("cold", "warm")[: 1 + (layers in again)]:
            cached = CACHED.get(name)
            arguments = (family, layers, dynamic, outlined, lowering, cached)
            row = in_process(__file__, "first_call", *arguments, cache=cache)
            rows.append({"case": name, "layers": layers, "caches": state, **row})
            parts = ", ".join(f"{key} {row[key]:.1f}" for key in PARTS)
            print(f"  {layers:3d} layers, {state}: {row['seconds']:6.1f} s ({parts})", flush=True)
    for unit in ("seconds", "cpu"):
        colds = {row["layers"]: row[unit] for row in rows if row["caches"] == "cold"}
        for layers in colds.keys() - {2} if 2 in colds else ():
            print(f"  {layers} layers over 2, {unit}: {colds[layers] / colds[2]:.2f}", flush=True)
    return rows


PARTS = ("cpu", "compilers", "tracing", "guards", "aot", "metadata", "passes", "inductor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 and 8 layers; nothing saved")
    parser.add_argument("--case", choices=[*CASES, "step"], action="append")
    parser.add_argument("--depth", type=int, action="append", help="layers, in place of the cases'")
    parser.add_argument("--out", default="benchmarks/results/compile_time.json")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    chosen = options.case or [*CASES, "step"]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        in_process(__file__, "precompile_header", cache=cache)
        for name in chosen:
            print(name, flush=True)
            if name != "step":
                rows += run_case(name, options.quick, options.depth, cache)
                continue
            blocks = 5 if options.quick else 20
            steps = in_process(__file__, "step_time", STEP_DEPTH, blocks, cache=cache)
            for row in steps:
                print(f"  {row['arm']}: {row['median']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
            rows += steps
    if not options.quick:
        path = Path(options.out)
        measured = {(row["case"], row.get("layers")) for row in rows}
        some = options.case or options.depth
        old = json.loads(path.read_text())["rows"] if some and path.exists() else []
        rows = [row for row in old if (row["case"], row.get("layers")) not in measured] + rows
        save(path, "first call of a Llama and a Qwen3-Next of hidden 512, r=16, [8, 1]", rows)


if __name__ == "__main__":
    main()
