"""What the GPU queue runs, the most valuable first: what a user sees, whether it is right, whole
steps, single linears. Nothing here imports torch.

To measure one more way to compute a linear with LoRA, add a line to ARMS. To measure anything else,
add a Job. A job's function lies in a module of this folder; what it gets is a gpu_job.Context:

    def job(context, **arguments):
        context.measure(cases, rows_of_case)    # of each of a dict, on disk once it is measured

It has to work in a tiny form on a CPU, kernels in Triton's interpreter (`context.tiny`): that is
what `make gpu-check` runs before GPU time is spent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300.0  # seconds of a job


@dataclass(frozen=True)
class Job:
    """One subprocess of the queue.

    Attributes:
        name: unique; what --only matches.
        group: the file of its results; what copies results back may be limited to a few.
        run: "module:function" of this folder, called with a Context and `arguments`.
        sources: files and folders whose change makes the result stale.
        estimate: seconds that it is thought to take; once measured, what it took counts.
    """

    name: str
    group: str
    run: str
    arguments: Mapping[str, Any]
    sources: tuple[str, ...]
    estimate: float


@dataclass(frozen=True)
class Arm:
    """A way to compute one packed linear with LoRA, which is compared with the vendor's GEMM.

    Attributes:
        phases: "prefill", "decode".
        make: a function of gpu_linear; function(case, device, **arguments) gives what makes a call
            for a copy, or raises Unfit where the case is not for the arm.
        plain: whether it computes the base alone.
    """

    name: str
    phases: tuple[str, ...]
    make: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False


BOTH, PREFILL, DECODE = ("prefill", "decode"), ("prefill",), ("decode",)
#: The most promising first.
ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("plan", BOTH, "planned"),
        Arm("concat", PREFILL, "strategy", {"name": "concat"}),
        Arm("segments", PREFILL, "strategy", {"name": "segments"}),
        Arm("split", DECODE, "strategy", {"name": "split"}),
        Arm("epilogue", BOTH, "strategy", {"name": "epilogue"}),
        Arm("inside vLLM", BOTH, "in_vllm"),
        Arm("plan, no adapter", BOTH, "nobody", plain=True),
        Arm("gemv", DECODE, "strategy", {"name": "gemv"}),
    )
}
KERNELS, WHOLE = ("kernels",), ("kernels", "passes", "lorafx")
PROTOCOL = (
    "lorafx/integrations/cli/measuring.py",
    "benchmarks/protocol.py",
    "benchmarks/gpu_protocol.py",
)
MODEL = ("benchmarks/gpu_model.py", "benchmarks/cpu_mixed.py", *PROTOCOL, *WHOLE)
EXPERTS = ("benchmarks/moe.py", "benchmarks/moe_cases.py", *PROTOCOL, *WHOLE)
HELPERS = ("tests/helpers/on_device.py", "tests/helpers/triton_cases.py", "tests/gpu/conftest.py")


def linear_job(phase: str) -> Job:
    """All arms of a phase, each on the packed linears of Llama-3-8B."""
    files = ("benchmarks/gpu_linear.py", "benchmarks/tune.py", *PROTOCOL)
    sources = (*files, *KERNELS, "lorafx/integrations/vllm/launches.py")
    given, name = {"phase": phase}, f"linears: {phase}"
    return Job(name, phase, "gpu_linear:compare_arms", given, sources, 90.0)


def step_job(kind: str, estimate: float) -> Job:
    return Job(f"step: {kind}", "steps", "gpu_model:run_step", {"kind": kind}, MODEL, estimate)


def experts_job(kind: str) -> Job:
    given, name = {"kind": kind}, f"experts: {kind}"
    return Job(name, "experts", "moe:run_on_gpu", given, EXPERTS, 60.0)


def attention_job(phase: str) -> Job:
    sources = ("benchmarks/paged_attention.py", *PROTOCOL, *KERNELS)
    given, name = {"phase": phase}, f"attention: {phase}"
    return Job(name, "steps", "paged_attention:attend_on_gpu", given, sources, 80.0)


def test_jobs() -> Iterator[Job]:
    """A job for each file of tests/gpu; kernels, on which all others rest, go first."""
    files = sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    for name in sorted(files, key=lambda name: name != "test_kernels.py"):
        file, runs = f"tests/gpu/{name}", KERNELS if name == "test_kernels.py" else WHOLE
        # What is timed must have the GPU to itself.
        given = {"file": file, "lanes": 1 if name == "test_measuring.py" else 6}
        sources = (file, *HELPERS, *runs)
        yield Job(f"tests: {name}", "tests", "gpu_tests:run_file", given, sources, 80.0)


def all_jobs() -> tuple[Job, ...]:
    """Every job, the most valuable first. The first five fit into eight minutes."""
    kernels, *tests = test_jobs()
    return (
        Job("user", "steps", "gpu_model:run_user", {}, MODEL, 150.0),
        kernels,
        step_job("prefill", 80.0),
        step_job("decode", 105.0),
        experts_job("decode"),
        linear_job("prefill"),
        linear_job("decode"),
        attention_job("decode"),
        experts_job("prefill"),
        *tests,
        attention_job("chunks"),
    )
