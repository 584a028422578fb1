"""What the GPU benchmarks do without a GPU: arms that are right, refusals, budgets, workloads, the
queue's registry and report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("bench")


@pytest.mark.slow
def test_every_arm_of_the_layer_benchmark_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_layers

    options = gpu_layers.parse(["--self-check"])
    assert gpu_layers.self_check(options) >= 30
    assert "nothing was measured" in capsys.readouterr().out


@pytest.mark.quick
def test_a_wrong_arm_is_not_measured() -> None:
    import gpu_layers
    from gpu_cases import TINY, Copy

    copy = Copy.random(TINY[1], torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"tiny o .* base is off by"):
        gpu_layers.check(TINY[1], copy, {"base": lambda c: c.base})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["gpu_layers", "gpu_model"])
def test_without_a_gpu_they_refuse(name: str, tmp_path: Path) -> None:
    import importlib

    out = tmp_path / "results.json"
    with pytest.raises(SystemExit, match=f"{name}.py measures on a GPU and this machine has none"):
        importlib.import_module(name).main(["--out", str(out)])
    assert not out.exists()


@pytest.mark.quick
def test_workloads_are_those_of_the_models() -> None:
    from gpu_cases import LAYERS, MIXES, cases

    shapes = {(K, sum(sizes)) for layers in LAYERS.values() for K, sizes in layers.values()}
    assert {(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)} <= shapes
    assert {(8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)} <= shapes
    assert {(3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)} <= shapes
    for model, layers in LAYERS.items():
        all_cases = list(cases(model))
        assert len(all_cases) == len(MIXES) * len(layers)
        assert all(case.slots >= case.distinct for case in all_cases)


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"


def test_the_registry_is_sound() -> None:
    """Names are unique, sources exist, a run fits into nine minutes, results into few files."""
    from gpu_jobs import ARMS, GROUPS, all_jobs, arm_named
    from gpu_results import Digests, source_files

    jobs = all_jobs()
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    digests = Digests()
    for place, job in enumerate(jobs):
        assert job.group in GROUPS
        assert job.estimate <= job.most <= 540
        assert source_files(job.sources)
        assert digests.of(job, {}) == digests.of(job, {})
        earlier = names[:place]
        assert set(job.inputs) <= set(earlier), job.name
        if "arm" in job.arguments:
            arm = arm_named(str(job.arguments["arm"]))
            assert (job.group in arm.phases, job.inputs) == (True, arm.inputs)
        module, _, function = job.run.partition(":")
        assert f"\ndef {function}(" in (FOLDER / f"{module}.py").read_text(), job.run
    from lorafx.kernels.cost.roofline import GPU_STRATEGIES

    measured = {arm.arguments.get("name") for arm in ARMS}
    # One of batches so small that it is not among the mixes; the jobs of correctness have it.
    assert set(GPU_STRATEGIES) <= measured
    assert len(GROUPS) <= 8
    files = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert files == {name.partition(": ")[2] for name in names if name.startswith("tests: ")}


def test_the_report_needs_no_torch_and_says_what_is_to_do(tmp_path: Path) -> None:
    """As anybody runs it: by the interpreter alone, no package installed."""
    command = [sys.executable, "-S", str(FOLDER / "gpu_queue.py"), "--report"]
    done = subprocess.run([*command, "--only", "prefill main"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prefill main: segments" in done.stdout
