"""What the GPU queue runs, the most valuable first. Nothing here imports torch.

To measure one more way to compute a linear with LoRA, add a line to ARMS. To measure anything else,
add a Job. A job's function lies in a module of this folder; what it gets is a gpu_job.Context:

    def job(context, **arguments):
        context.measure(cases, rows_of_case)    # of each of a dict, on disk once it is measured

It has to work in a tiny form on a CPU, kernels in Triton's interpreter (`context.tiny`): that is
what `make gpu-check` runs before GPU time is spent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 530.0  # seconds of a job: who lends a machine may end a command after ten minutes


@dataclass(frozen=True)
class Job:
    """One subprocess of the queue.

    Attributes:
        name: unique; what --only matches.
        group: the file of its results; what copies results back may be limited to a few.
        run: "module:function" of this folder, called with a Context and `arguments`.
        sources: files and folders whose change makes the result stale.
        estimate: seconds that it is thought to take; once measured, what it took counts.
        inputs: jobs whose kept files (chip figures, tuned tiles) it finds in the cache folder.
        needs: a package of peers that it needs, installed or in the folder of --peers.
        tiny: what its tiny form is called, where jobs of the same function share one.
    """

    name: str
    group: str
    run: str
    arguments: Mapping[str, Any]
    sources: tuple[str, ...]
    estimate: float
    inputs: tuple[str, ...] = ()
    needs: str = ""
    tiny: str = ""


@dataclass(frozen=True)
class Arm:
    """A way to compute one packed linear with LoRA, which is compared with the vendor's GEMM.

    Attributes:
        phases: "prefill", "decode".
        make: a function of gpu_linear; function(case, device, **arguments) gives what makes a call
            for a copy, or raises Unfit where the case is not for the arm.
        sources: what decides its speed, beside what all arms share.
        inputs, needs: as of a Job.
        plain: whether it computes the base alone.
    """

    name: str
    phases: tuple[str, ...]
    make: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ("kernels/triton",)
    inputs: tuple[str, ...] = ()
    needs: str = ""
    plain: bool = False


BOTH, PREFILL, DECODE = ("prefill", "decode"), ("prefill",), ("decode",)
KERNELS, WHOLE = ("kernels",), ("kernels", "passes", "lorafx")
PLAN = ("kernels/triton", "kernels/cost")
VLLM = ("kernels/triton", "lorafx/integrations/vllm/launches.py")
PROTOCOL = (
    "lorafx/integrations/cli/measuring.py",
    "benchmarks/protocol.py",
    "benchmarks/gpu_protocol.py",
)
LINEAR = (*PROTOCOL, "benchmarks/gpu_linear.py", "benchmarks/tune.py")
LAYERS = ("q/k/v", "o", "gate/up", "down")
CHIP = ("calibrate",)
TUNED = (*CHIP, *(f"tune split: {layer} M=64 r=16" for layer in LAYERS))
PEERS = {"sources": ("benchmarks/peers.py", *PLAN), "inputs": CHIP}
#: The most promising first.
ARMS: Mapping[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("plan", BOTH, "planned", sources=PLAN, inputs=CHIP),
        Arm("concat", PREFILL, "strategy", {"name": "concat"}),
        Arm("segments", PREFILL, "strategy", {"name": "segments"}),
        Arm("split", DECODE, "strategy", {"name": "split"}),
        Arm("epilogue", BOTH, "strategy", {"name": "epilogue"}),
        Arm("inside vLLM", BOTH, "in_vllm", sources=VLLM),
        Arm("plan, no adapter", BOTH, "nobody", sources=PLAN, inputs=CHIP, plain=True),
        Arm("gemv", DECODE, "strategy", {"name": "gemv"}),
        Arm("plan, tuned", DECODE, "planned", sources=PLAN, inputs=TUNED),
        Arm("vllm", BOTH, "peer", {"package": "vllm"}, **PEERS, needs="vllm"),
        Arm("sglang", BOTH, "peer", {"package": "sglang"}, **PEERS, needs="sglang"),
    )
}
#: (rows, distinct adapters, rank) by phase: what the goals are about, and the rest.
MIXES: Mapping[str, Mapping[str, tuple[tuple[int, int, int], ...]]] = {
    "prefill": {
        "main": ((8192, 8, 16), (8192, 1, 16)),
        "rest": ((2048, 8, 16), (512, 8, 16), (2048, 1, 16), (512, 1, 16), (8192, 8, 64)),
    },
    "decode": {
        "main": ((64, 8, 16), (64, 1, 16), (64, 32, 16)),
        "rest": (
            *((1, 1, 16), (8, 8, 16), (32, 8, 16), (128, 8, 16), (256, 8, 16), (256, 32, 16)),
            *((8, 1, 16), (32, 1, 16), (32, 32, 16), (64, 8, 64), (128, 32, 16)),
            *((128, 1, 16), (256, 1, 16)),
        ),
    },
}


def arm_jobs(
    phase: str, part: str, names: Iterable[str] = ARMS, model: str = "llama-8b"
) -> Iterator[Job]:
    """A job for each arm of the phase: a model's linears, one mix after the other."""
    title = f"{phase} {part}" if model == "llama-8b" else f"{phase} {model}"
    for arm in (ARMS[name] for name in names if phase in ARMS[name].phases):
        yield Job(
            f"{title}: {arm.name}",
            phase,
            "gpu_linear:compare_arm",
            {"phase": phase, "part": part, "arm": arm.name, "model": model},
            (*LINEAR, *arm.sources),
            15.0 + 4 * len(MIXES[phase][part]) * len(LAYERS),
            arm.inputs,
            arm.needs,
            f"{phase} {arm.name}",
        )


#: Seconds of a test file, and what it runs, where it is not a whole model.
TESTS: Mapping[str, tuple[float, tuple[str, ...]]] = {
    "test_kernels.py": (90.0, KERNELS),
    "test_paged_attention.py": (120.0, (*KERNELS, "tests/helpers/paged_steps.py")),
    "test_measuring.py": (100.0, (*KERNELS, *LINEAR)),
}
HELPERS = ("tests/helpers/on_device.py", "tests/helpers/triton_cases.py", "tests/gpu/conftest.py")


def test_jobs() -> Iterator[Job]:
    for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        estimate, runs = TESTS.get(path.name, (110.0, WHOLE))
        file = f"tests/gpu/{path.name}"
        # What is timed must have the GPU to itself.
        arguments = {"file": file, "lanes": 1 if path.name == "test_measuring.py" else 6}
        sources = (file, *HELPERS, *runs)
        yield Job(
            f"tests: {path.name}", "tests", "gpu_tests:run_file", arguments, sources, estimate
        )


def tune_job(layer: str) -> Job:
    run, sources = "gpu_tuning:tune_tiles", (*LINEAR, "benchmarks/gpu_tuning.py", "kernels/triton")
    name = f"tune split: {layer} M=64 r=16"
    return Job(name, "tuning", run, {"layer": layer}, sources, 120.0, tiny="split")


def model_job(run: str, name: str, estimate: float, tiny: str, **arguments: Any) -> Job:
    """Of a whole model, with the tiles and the chip's figures of other jobs."""
    module = run.partition(":")[0]
    files = ("gpu_model", "moe_cases", module) if module == "moe" else (module, "cpu_mixed")
    sources = (*(f"benchmarks/{file}.py" for file in files), *PROTOCOL, *WHOLE)
    group = "experts" if module == "moe" else "steps"
    return Job(name, group, run, arguments, sources, estimate, TUNED, tiny=tiny)


def step_job(kind: str, batch: int, pins: str | None = None) -> Job:
    """A whole step, all linears by the strategy `pins` if it is given."""
    name = f"step: {kind} [{batch}, {1 if kind == 'decode' else 1024}]{f', {pins}' if pins else ''}"
    more = {"kind": kind, "batch": batch, "pins": pins}
    return model_job("gpu_model:run_step", name, 130.0, pins or kind, **more)


def generate_job(batch: int) -> Job:
    name, tiny = f"generate: batch {batch}", "one request" if batch == 1 else "several"
    return model_job("gpu_model:run_generate", name, 420.0, tiny, batch=batch)


def attention_job(phase: str) -> Job:
    run, sources = "paged_attention:attend_on_gpu", ("benchmarks/paged_attention.py", *PROTOCOL)
    given = {"phase": phase}
    return Job(f"attention: {phase}", "steps", run, given, (*sources, *KERNELS), 200.0, tiny=phase)


def experts_job(kind: str) -> Job:
    return model_job("moe:run_on_gpu", f"experts: {kind}", 240.0, kind, kind=kind)


def all_jobs() -> tuple[Job, ...]:
    """Every job, the most valuable first."""
    chip = ("benchmarks/gpu_tuning.py", "benchmarks/calibrate.py", "kernels/triton")
    others = [(phase, model) for model in ("qwen2.5-7b", "llama-70b") for phase in BOTH]
    return (
        Job("calibrate", "tuning", "gpu_tuning:calibrate_chip", {}, chip, 30.0),
        *test_jobs(),
        *arm_jobs("prefill", "main"),
        *(tune_job(layer) for layer in LAYERS),
        *arm_jobs("decode", "main"),
        step_job("decode", 64),
        step_job("prefill", 8),
        step_job("prefill", 8, "segments"),
        *(generate_job(batch) for batch in (8, 64, 1)),
        *(attention_job(phase) for phase in ("decode", "chunks")),
        *(experts_job(kind) for kind in ("decode", "prefill")),
        *(step_job("decode", batch) for batch in (32, 1, 8, 128, 256)),
        *arm_jobs("prefill", "rest"),
        *arm_jobs("decode", "rest"),
        *(job for phase, model in others for job in arm_jobs(phase, "main", ["plan"], model)),
    )
