"""What the GPU queue runs, the most valuable first: what a user sees, whether it is right, whole
steps, single linears. Nothing here imports torch.

To measure one more way to compute a linear with LoRA, add a line to ARMS of gpu_linear.py. To
measure anything else, add a Job. Its function lies in a module of this folder and gets a
gpu_job.Context:

    def job(context, **arguments):
        context.measure(cases, rows_of_case)    # of each of a dict, on disk once it is measured

It has to work in a tiny form on a CPU, kernels in Triton's interpreter (`context.tiny`): that is
what `make gpu-check` runs before GPU time is spent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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


KERNELS, WHOLE = ("kernels",), ("kernels", "passes", "lorafx")
PROTOCOL = (
    "lorafx/integrations/cli/measuring.py",
    "benchmarks/protocol.py",
    "benchmarks/gpu_protocol.py",
)
HELPERS = ("tests/helpers/on_device.py", "tests/helpers/triton_cases.py", "tests/gpu/conftest.py")
MODEL = ("benchmarks/gpu_model.py", "benchmarks/cpu_mixed.py", *PROTOCOL, *WHOLE)
EXPERTS = ("benchmarks/moe.py", "benchmarks/moe_cases.py", *PROTOCOL, *WHOLE)
ATTENTION = ("benchmarks/paged_attention.py", *PROTOCOL, *KERNELS)
LINEARS = ("benchmarks/gpu_linear.py", "benchmarks/tune.py", *PROTOCOL, *KERNELS)
LINEARS += ("lorafx/integrations/vllm/launches.py",)
#: Kinds of jobs that measure a phase: group, function, sources.
KINDS = {
    "step": ("steps", "gpu_model:run_step", MODEL),
    "experts": ("experts", "moe:run_on_gpu", EXPERTS),
    "attention": ("steps", "paged_attention:attend_on_gpu", ATTENTION),
    "linears": ("linears", "gpu_linear:compare_arms", LINEARS),
}


def phase_job(kind: str, phase: str, estimate: float) -> Job:
    group, run, sources = KINDS[kind]
    return Job(f"{kind}: {phase}", group, run, {"phase": phase}, sources, estimate)


def test_jobs() -> Iterator[Job]:
    """A job for each file of tests/gpu; kernels, on which all others rest, go first."""
    files = sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    for name in sorted(files, key=lambda name: name != "test_kernels.py"):
        file, runs = f"tests/gpu/{name}", KERNELS if name == "test_kernels.py" else WHOLE
        # What is timed must have the GPU to itself.
        given = {"file": file, "workers": 1 if name == "test_measuring.py" else 6}
        sources = (file, *HELPERS, *runs)
        yield Job(f"tests: {name}", "tests", "gpu_tests:run_file", given, sources, 80.0)


def all_jobs() -> tuple[Job, ...]:
    """Every job, the most valuable first. The first five fit into eight minutes."""
    kernels, *tests = test_jobs()
    return (
        Job("user", "steps", "gpu_model:run_user", {}, MODEL, 150.0),
        kernels,
        phase_job("step", "prefill", 80.0),
        phase_job("step", "decode", 105.0),
        phase_job("experts", "decode", 60.0),
        phase_job("linears", "prefill", 90.0),
        phase_job("linears", "decode", 90.0),
        phase_job("attention", "decode", 80.0),
        phase_job("experts", "prefill", 60.0),
        *tests,
        phase_job("attention", "chunks", 80.0),
    )
