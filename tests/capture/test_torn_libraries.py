"""What a process leaves in Inductor's cache that is killed while it compiles."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dense_merge import save_adapter
from torch import nn

SCRIPT = """
import sys, torch, lorafx
from torch import nn
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).eval().requires_grad_(False)
cm = lorafx.compile(base, adapters={"a": sys.argv[1]})
x = torch.randn(3, 6)
found = cm(x, adapter_names=["a", None, "a"])
assert (found[1] - base(x)[1]).abs().max() < 1e-5
print("served", (found[0] - base(x)[0]).abs().max().item() > 1e-3)
"""


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    base = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).eval().requires_grad_(False)
    folder = save_adapter(base, tmp_path / "a", rank=2, targets=["0"], seed=1)
    (tmp_path / "serve.py").write_text(SCRIPT)
    return [sys.executable, str(tmp_path / "serve.py"), str(folder)]


def of_cache(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def serve(script: list[str], folder: Path) -> str:
    done = subprocess.run(script, env=of_cache(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "served True" in done.stdout
    return done.stderr


@pytest.mark.slow
def test_what_a_killed_process_leaves(script: list[str], tmp_path: Path) -> None:
    """The next one names each library that it needs and compiles it again, be it a kernel of
    Inductor, one of ours or a probe for vector instructions; the one after finds them."""
    cache = tmp_path / "cache"
    process = subprocess.Popen(script, env=of_cache(cache), start_new_session=True)
    while process.poll() is None and not any(cache.rglob("*.main.so")):
        time.sleep(0.0002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    whole = {path: path.stat().st_size for path in sorted(cache.rglob("*.so"))}
    for index, path in enumerate(whole):
        kernel = path.name.endswith(".main.so")  # which was being written
        os.truncate(path, 0 if kernel or index % 2 else whole[path] // 2)
    left = {path: path.stat().st_size for path in whole}
    said = serve(script, cache)
    again = [path for path in whole if path.stat().st_size != left[path]]
    assert any(path.name.endswith(".main.so") for path in again)
    assert len(again) > 1
    for path in again:
        assert f"{path} is not whole" in said
    assert "not whole" not in serve(script, cache)
