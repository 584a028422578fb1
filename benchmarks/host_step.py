"""The host's part of a decode step: guards, inputs, wrappers and checks, of graphs that compute
nothing.

    python benchmarks/host_step.py [--depth N] [--blocks 20] [--seconds 0.05] [--out FILE]

A Llama whose sizes do not matter decodes three requests, one token each, with a dynamic cache.
Each graph is traced and goes through AOTAutograd as ever, runs a few times, and from then on
returns what it returned last. What is left of a step is what the host does beside the kernels:
Dynamo's guards and the loading of inputs, AOTAutograd's wrappers, lorafx's setting of the batch and
its checks, and transformers' own code around the forward. Inductor's checks of inputs are not in
it.

    base              torch.compile(model), without lorafx
    lorafx base       lorafx.compile, no adapter
    lorafx mixed      lorafx.compile, two rows of three with an adapter
    backend base      torch.compile(model, backend="lorafx") of an attached model, outside of blocks
    backend mixed     the same in a block of lorafx.adapters, which is entered for every eight steps

Times are over `base` in the same run (benchmarks/protocol.py).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from protocol import as_row, compare, machine, save, save_adapter
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lorafx
from lorafx.capture import backend
from lorafx.capture.lowering import ReferenceLowering
from lorafx.progress import progress

NAMES = ["a", None, "a"]
STEPS = 8
#: Most time of a mixed step over the base's.
GOAL = 1.02
RESULTS = Path("benchmarks/results/host_step.json")
TITLE = (
    "the host's part of a decode step over that of torch.compile(model), graphs that compute "
    "nothing, Llama, three requests, dynamic cache"
)


@dataclass
class Hollow:
    """A graph in AOTAutograd's boxed convention that computes until `shared.still` is set, and then
    gives what it gave last."""

    compute: Callable[[list[Any]], Any]
    shared: Stillness
    last: Any = None
    _boxed_call = True

    def __call__(self, arguments: list[Any]) -> Any:
        if not self.shared.still:
            self.last = self.compute(arguments)
        return self.last


@dataclass
class Stillness:
    """Whether graphs have stopped computing."""

    still: bool = False

    def lowered(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Hollow:
        return Hollow(lambda arguments: gm.forward(*arguments), self)

    def base(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        """A graph of the base, through AOTAutograd as Inductor's go."""
        made: Callable[..., Any] = aot_autograd(
            fw_compiler=self.lowered, inference_compiler=self.lowered
        )(gm, examples)
        return made

    @contextmanager
    def in_reference_lowering(self) -> Iterator[None]:
        """Inside, `lowering="reference"` makes such graphs."""
        with (
            mock.patch.object(
                ReferenceLowering, "compile", lambda _, gm, ins: self.lowered(gm, ins)
            ),
            mock.patch.object(backend, "compile_base", lambda _, gm, ins: self.base(gm, ins)),
        ):
            yield


def build_model(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


class Decoding:
    """Decode steps of one way to compile the model, each with a cache of the same length."""

    def __init__(
        self,
        run: Callable[..., Any],
        cache: DynamicCache,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **named: Any,
    ) -> None:
        self.run, self.cache, self.around, self.named = run, copy.deepcopy(cache), around, named

    def step(self) -> Any:
        seen = self.cache.get_seq_length()
        rows = len(NAMES)
        return self.run(
            input_ids=torch.ones(rows, 1, dtype=torch.long),
            attention_mask=torch.ones(rows, seen + 1, dtype=torch.long),
            position_ids=torch.full((rows, 1), seen),
            past_key_values=self.cache,
            use_cache=True,
            **self.named,
        ).logits

    def __call__(self) -> None:
        with self.around():
            for _ in range(STEPS):
                self.step()


def decodings(layers: int, shared: Stillness, folder: Path) -> dict[str, Decoding]:
    """The arms, compiled, every graph still."""
    model = build_model(layers)
    adapters = {"a": save_adapter(model, folder, 4, r".*layers.*_proj")}
    options = {"lowering": "reference", "start": "compiled"}
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.arange(21).view(3, 7), past_key_values=cache, use_cache=True)
    cm = lorafx.compile(copy.deepcopy(model), adapters, options=options)
    attached = lorafx.attach(copy.deepcopy(model), adapters, options=options)
    by_backend = torch.compile(attached, backend="lorafx", dynamic=True)
    base = torch.compile(copy.deepcopy(model), backend=shared.base, dynamic=True)
    arms = {
        "base": Decoding(base, cache),
        "lorafx base": Decoding(cm, cache),
        "lorafx mixed": Decoding(cm, cache, adapter_names=NAMES),
        "backend base": Decoding(by_backend, cache),
        "backend mixed": Decoding(by_backend, cache, lambda: lorafx.adapters(attached, NAMES)),
    }
    with shared.in_reference_lowering():
        for name, arm in arms.items():
            with progress(f"{layers} layers, {name}: compiling"), arm.around():
                for _ in range(3):  # the cache has grown, so graphs have met what they give
                    arm.step()
    shared.still = True
    return arms


def run_case(layers: int, blocks: int, seconds: float) -> list[dict[str, object]]:
    """Rows of results of one depth."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        arms = decodings(layers, Stillness(), Path(folder))
        unchanged = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        base = arms.pop("base")
        with progress(f"{layers} layers: measuring"):
            ratios = compare(base, dict(arms), blocks=blocks, seconds=seconds)
        if torch._dynamo.utils.counters["stats"]["unique_graphs"] != unchanged:
            raise RuntimeError("a graph was compiled while steps were measured")
    rows = []
    for ratio in ratios:
        micro = ratio.milliseconds * 1e3 / STEPS
        goal = GOAL if ratio.arm != "A/A" else None
        reached = (
            f"; goal {goal} {'reached' if ratio.high <= goal else 'not reached'}" if goal else ""
        )
        times = f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        print(f"{layers:3d} layers  {ratio.arm:14s} {times} {micro:7.0f} µs{reached}", flush=True)
        rows.append(
            as_row(f"{layers} layers", ratio) | {"microseconds_a_step": micro, "goal": goal}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, action="append", help="layers; 8 and 32 without it")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--out", type=Path, help=f"a file for the rows, such as {RESULTS}")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    start = time.monotonic()
    for layers in options.depth or [8, 32]:
        torch._dynamo.reset()
        rows += run_case(layers, options.blocks, options.seconds)
    print(f"{time.monotonic() - start:.0f} s in all")
    if options.out:
        save(options.out, TITLE, rows, machine)


if __name__ == "__main__":
    main()
