"""vLLM's op for LoRA on routed experts: the blocks it is given, and the op itself if at hand."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CUT = Path(os.environ.get("LORAFX_PEERS", ROOT / ".peers")) / "vllm.zip"
OP = "vllm/lora/ops/triton_ops/fused_moe_lora_op.py"

pytestmark = pytest.mark.usefixtures("bench")


@pytest.mark.parametrize("block", [2, 16])
@pytest.mark.parametrize("name", ["gate/up", "down"])
def test_blocks_give_every_row_its_own_expert_and_adapter(name: str, block: int) -> None:
    """Deltas that are computed block by block, in float64, are those of the check."""
    import gpu_experts
    import peer_experts

    problem = gpu_experts.Product.random(name, "decode", 3, torch.device("cpu"), tiny=True)
    layer = problem.peer()
    choices, owners, used = peer_experts.aligned(layer, block)
    count, top = layer.experts.numel(), layer.experts.shape[1]
    assert sorted(choices[choices < count].tolist()) == list(range(count))
    assert used.tolist() == [int((row >= 0).sum()) * block for row in owners]

    def add(x: torch.Tensor, y: torch.Tensor) -> None:
        for slot, row in enumerate(owners.tolist()):
            for place, expert in enumerate(row[: int(used[slot]) // block]):
                mine = choices[slot, place * block : (place + 1) * block]
                mine = mine[mine < count].long()
                h = x[mine if layer.by_choice else mine // top].double()
                pairs = zip(layer.A, layer.B, strict=True)
                deltas = [
                    h @ A[slot, expert].double().T @ B[slot, expert].double().T for A, B in pairs
                ]
                y[mine] += torch.cat(deltas, 1).to(y.dtype)

    assert problem.error(problem.with_peer(add, arrange=True)()) < gpu_experts.ROUNDING
    assert problem.error(problem.base()()) > 100 * gpu_experts.ROUNDING


def test_without_the_op_the_job_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_experts
    import peer_experts

    with zipfile.ZipFile(tmp_path / "vllm.zip", "w") as archive:
        archive.writestr("vllm/lora/ops/triton_ops/lora_shrink_op.py", "")
    monkeypatch.setenv("LORAFX_PEERS", str(tmp_path))
    assert "FileNotFoundError: no fused_moe_lora_op.py below" in str(peer_experts.find())
    with pytest.raises(FileNotFoundError, match=r"no fused_moe_lora_op\.py below .*vllm\.zip"):
        gpu_experts.run_peer(None, product="down", phase="decode")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(
    not CUT.exists() or OP not in zipfile.ZipFile(CUT).namelist(),
    reason=f"no {CUT} with vLLM's fused op (benchmarks/peers.py cut)",
)
@pytest.mark.parametrize("product", ["gate/up", "down"])
def test_the_op_is_right_in_the_interpreter(product: str) -> None:
    """In a process of its own: Triton interprets plain kernels only if told before its import."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "LORAFX_PEERS": str(CUT.parent),
    }
    job = f"peers: vllm experts {product} decode"
    code = f"import gpu_job, sys; sys.exit(gpu_job.main(['--self-check', {job!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'benchmarks'); {code}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{job}: right" in done.stdout
