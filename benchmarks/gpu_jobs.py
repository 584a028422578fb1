"""What the GPU queue runs: arms and jobs, in order of value. Nothing here imports torch.

To measure one more way to compute a linear with LoRA, add a line to ARMS. To measure anything else,
add a Job. A job's function lies in a module of this folder; what it gets is a gpu_job.Context:

    def measure(context, **arguments):
        for key in context.order(keys):     # those that are not measured yet
            with context.case(key):         # an error is noted, and the next key has its turn
                context.add(key, rows)      # on disk from here on

It has to work in a tiny form on a CPU, kernels in Triton's interpreter (`context.tiny`): that is
what `gpu_queue.py --self-check` runs before GPU time is spent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: A job's results are a file a group. What copies results back may be limited to a few files.
GROUPS = ("tests", "correct", "prefill", "decode", "tuning", "steps", "experts", "peers")
MOST = 530.0  # seconds of a job: who lends a machine may end a command after ten minutes


@dataclass(frozen=True)
class Job:
    """One subprocess of the queue.

    Attributes:
        name: unique; what --only matches.
        run: "module:function" of this folder, called with a Context and `arguments`.
        sources: files and folders whose change makes the result stale.
        estimate: seconds that it is thought to take; once measured, what it took counts.
        most: seconds after which it is killed; what it has put on disk is kept.
        inputs: jobs whose kept files (chip figures, tuned tiles) it finds in the cache folder.
        needs: packages of peers that it needs, installed or in the folder of --peers.
        tiny: what its tiny form is called, where jobs of the same function share one.
    """

    name: str
    group: str
    run: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    estimate: float = 90.0
    most: float = MOST
    inputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    tiny: str = ""

    @property
    def tiny_form(self) -> tuple[str, str]:
        """Equal for jobs that do the same in a self-check."""
        return self.run, self.tiny or self.name


# --- arms: ways to compute one packed linear with LoRA, each compared with the vendor's GEMM ---


@dataclass(frozen=True)
class Arm:
    """A way to compute base and delta.

    Attributes:
        name: of the arm in results.
        phases: "prefill", "decode".
        make: "module:function"; function(case, device, **arguments) gives what makes a call for a
            gpu_cases.Copy, or raises gpu_compare.Unfit where the case is not for the arm.
        sources: what decides its speed, beside what all arms share.
        inputs: as of a Job.
        tiny: (K, sizes, rows, adapters, rank) of its self-check, where the usual one is too small.
    """

    name: str
    phases: tuple[str, ...]
    make: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    sources: tuple[str, ...] = ("kernels/triton",)
    inputs: tuple[str, ...] = ()
    tiny: tuple[int, tuple[int, ...], int, int, int] | None = None


PREFILL, DECODE = ("prefill",), ("decode",)
CALIBRATE = "calibrate"
PLANNED = {"sources": ("kernels/triton", "kernels/cost"), "inputs": (CALIBRATE,)}
#: A reader of "split" that looks ranks up slot by slot and multiplies one adapter after another.
ONE_BY_ONE = {"reduce": {"at_once": 0, "block_r": 16}}
#: The most promising first.
ARMS: tuple[Arm, ...] = (
    Arm("plan", PREFILL + DECODE, "gpu_compare:planned", **PLANNED),
    Arm(
        "concat",
        PREFILL,
        "gpu_compare:strategy",
        {"name": "concat"},
        sources=("kernels/triton", "benchmarks/gpu_concat.py"),
    ),
    Arm("segments", PREFILL, "gpu_compare:strategy", {"name": "segments"}),
    Arm("split", DECODE, "gpu_compare:strategy", {"name": "split"}),
    Arm(
        "split, one by one",
        DECODE,
        "gpu_compare:strategy",
        {"name": "split", "changes": ONE_BY_ONE},
    ),
    Arm("epilogue", DECODE + PREFILL, "gpu_compare:strategy", {"name": "epilogue"}),
    Arm(
        "inside vLLM",
        DECODE + PREFILL,
        "gpu_compare:in_vllm",
        sources=("kernels/triton", "lorafx/integrations/vllm/launches.py"),
    ),
    Arm("plan, no adapter", DECODE + PREFILL, "gpu_compare:nobody", **PLANNED),
    Arm("gemv", DECODE, "gpu_compare:strategy", {"name": "gemv"}),
)
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
LAYERS = ("q/k/v", "o", "gate/up", "down")
MODELS = ("llama-8b", "qwen2.5-7b", "llama-70b")
PROTOCOL = (
    "lorafx/integrations/cli/measuring.py",
    "benchmarks/protocol.py",
    "benchmarks/gpu_protocol.py",
)
SHARED = (
    *PROTOCOL,
    "benchmarks/gpu_cases.py",
    "benchmarks/gpu_compare.py",
)


def arm_jobs(phase: str, part: str, arms: tuple[Arm, ...] = ARMS) -> Iterator[Job]:
    """A job for each arm of the phase: Llama-3-8B's linears, one mix after the other."""
    cases = len(MIXES[phase][part]) * len(LAYERS)
    for arm in arms:
        if phase in arm.phases:
            yield Job(
                f"{phase} {part}: {arm.name}",
                phase,
                "gpu_compare:compare",
                {"phase": phase, "part": part, "arm": arm.name},
                (*SHARED, *arm.sources),
                estimate=15.0 + 4 * cases,
                inputs=arm.inputs,
                tiny=f"{phase} {arm.name}",
            )


# --- all jobs ---

KERNELS = ("kernels",)
WHOLE = ("kernels", "passes", "lorafx")
#: Seconds of a test file, and what it runs, where it is not a whole model.
TESTS: Mapping[str, tuple[float, tuple[str, ...]]] = {
    "test_kernels.py": (90.0, KERNELS),
    "test_paged_attention.py": (120.0, (*KERNELS, "tests/helpers/paged_steps.py")),
    "test_measuring.py": (100.0, (*KERNELS, *SHARED, "benchmarks/gpu_layers.py")),
}
HELPERS = ("tests/helpers/on_device.py", "tests/helpers/triton_cases.py", "tests/gpu/conftest.py")


def test_jobs() -> Iterator[Job]:
    for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        estimate, sources = TESTS.get(path.name, (110.0, WHOLE))
        file = f"tests/gpu/{path.name}"
        # What is timed must have the GPU to itself.
        lanes = 1 if path.name == "test_measuring.py" else 6
        arguments = {"file": file, "lanes": lanes}
        run = "gpu_tests:run_file"
        yield Job(
            f"tests: {path.name}", "tests", run, arguments, (file, *HELPERS, *sources), estimate
        )


def correctness_job(model: str, estimate: float) -> Job:
    name, arguments = f"correct: {model}", {"model": model}
    sources = (*SHARED, "kernels")
    tiny = "" if model == "odd sizes" else "models"
    return Job(name, "correct", "gpu_compare:correct", arguments, sources, estimate, tiny=tiny)


def tuning_job(strategy: str, layer: str, rows: int, rank: int = 16) -> Job:
    """Tiles of one strategy for one linear of Llama-3-8B."""
    name = f"tune {strategy}: {layer} M={rows} r={rank}"
    arguments = {"strategy": strategy, "layer": layer, "rows": rows, "rank": rank, "most": 40}
    sources = ("benchmarks/gpu_tuning.py", "benchmarks/tune.py", "kernels/triton")
    return Job(name, "tuning", "gpu_tuning:tune_tiles", arguments, sources, 120.0, tiny=strategy)


TUNING = tuple(tuning_job("split", layer, 64) for layer in LAYERS)
TUNED = Arm(
    *("plan, tuned", DECODE, "gpu_compare:planned"),
    sources=("kernels/triton", "kernels/cost"),
    inputs=(CALIBRATE, *(job.name for job in TUNING)),
)


def arm_named(name: str) -> Arm:
    """The arm of a job.

    Raises:
        KeyError: there is none of that name.
    """
    return {arm.name: arm for arm in (*ARMS, TUNED)}[name]


#: Strategies of a layer's linears to compare in whole steps of prefill, whatever the plan takes.
SEGMENTS = dict.fromkeys(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "segments"
)


def step_job(
    place: int, label: str, estimate: float = 130.0, pins: Mapping[str, str] | None = None
) -> Job:
    """A whole step, by its place in gpu_model.STEPS."""
    sources = ("benchmarks/gpu_model.py", *PROTOCOL, *WHOLE)
    run, inputs = "gpu_model:run_step", TUNED.inputs
    arguments = {"place": place, "pins": pins}
    tiny = label if pins else label.partition(" ")[0]
    name = f"step: {label}"
    return Job(name, "steps", run, arguments, sources, estimate, inputs=inputs, tiny=tiny)


def generate_job(batch: int) -> Job:
    """Whole generation with a static cache and CUDA graphs, beside PEFT."""
    sources = ("benchmarks/gpu_generate.py", "benchmarks/gpu_model.py", *PROTOCOL, *WHOLE)
    name, arguments = f"generate: batch {batch}", {"batch": batch}
    run, inputs = "gpu_generate:run_generate", TUNED.inputs
    tiny = "one request" if batch == 1 else "several"
    return Job(name, "steps", run, arguments, sources, 420.0, inputs=inputs, tiny=tiny)


def experts_job(kind: str) -> Job:
    sources = ("benchmarks/moe.py", "benchmarks/moe_cases.py", *PROTOCOL, *WHOLE)
    name, arguments = f"experts: {kind}", {"kind": kind}
    return Job(name, "experts", "moe:run_on_gpu", arguments, sources, 240.0, inputs=(CALIBRATE,))


def attention_job(phase: str) -> Job:
    """Attention over a paged cache, beside torch's by a mask over the keys of all requests."""
    files = ("benchmarks/gpu_attention.py", "benchmarks/paged_attention.py")
    name, run, arguments = f"attention: {phase}", "gpu_attention:attend", {"phase": phase}
    return Job(name, "steps", run, arguments, (*files, *SHARED[:2], *KERNELS), 200.0, tiny=phase)


def peers_job(package: str, layer: str) -> Job:
    sources = (*SHARED, "benchmarks/gpu_layers.py", "benchmarks/peers.py", "kernels/triton")
    return Job(
        *(f"peers: {package} {layer}", "peers", "gpu_layers:run_peer"),
        {"package": package, "layer": layer},
        (*sources, "kernels/cost"),
        60.0,
        inputs=(CALIBRATE,),
        needs=(package,),
        tiny=package,
    )


def all_jobs() -> tuple[Job, ...]:
    """Every job, the most valuable first."""
    chip = ("benchmarks/gpu_tuning.py", "benchmarks/calibrate.py", "kernels/triton")
    return (
        Job(CALIBRATE, "tuning", "gpu_tuning:calibrate_chip", sources=chip, estimate=30.0),
        *test_jobs(),
        correctness_job("llama-8b", 300.0),
        *arm_jobs("prefill", "main"),
        *arm_jobs("decode", "main"),
        *TUNING,
        *arm_jobs("decode", "main", (TUNED,)),
        step_job(0, "decode [64, 1]"),
        step_job(2, "prefill [8, 1024]"),
        step_job(2, "prefill [8, 1024], segments", pins=SEGMENTS),
        *(generate_job(batch) for batch in (8, 64, 1)),
        *(attention_job(phase) for phase in ("decode", "chunks")),
        experts_job("decode"),
        experts_job("prefill"),
        *(peers_job(package, layer) for layer in LAYERS for package in ("vllm", "sglang")),
        step_job(1, "decode [32, 1]"),
        step_job(3, "decode [1, 1]"),
        step_job(4, "decode [8, 1]"),
        step_job(5, "decode [128, 1]"),
        step_job(6, "decode [256, 1]"),
        *arm_jobs("prefill", "rest"),
        *arm_jobs("decode", "rest"),
        correctness_job("odd sizes", 120.0),
        correctness_job("qwen2.5-7b", 120.0),
        correctness_job("llama-70b", 240.0),
    )
