"""What a process leaves in Inductor's cache that is killed while it compiles."""

from __future__ import annotations

import os
import shutil
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


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.so"))


def serve(script: list[str], folder: Path) -> str:
    done = subprocess.run(script, env=of_cache(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "served True" in done.stdout
    return done.stderr


def test_a_process_that_was_killed_while_it_linked(script: list[str], tmp_path: Path) -> None:
    """The next one names the library and compiles it again; the one after finds it."""
    cache = tmp_path / "cache"
    process = subprocess.Popen(script, env=of_cache(cache), start_new_session=True)
    while process.poll() is None and not any(cache.rglob("*.main.so")):
        time.sleep(0.0002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (torn,) = [path for path in libraries(cache) if path.name.endswith(".main.so")]
    if torn.stat().st_size:  # it was quicker
        os.truncate(torn, 0)
    assert f"{torn} is not whole" in serve(script, cache)
    assert "not whole" not in serve(script, cache)


@pytest.mark.parametrize("left", [0.0, 0.5])
def test_all_libraries_of_a_cache(script: list[str], tmp_path: Path, left: float) -> None:
    """Kernels of Inductor, those of ours, and the probes for vector instructions, empty or without
    their ends."""
    cache = tmp_path / "cache"
    serve(script, cache)
    found = libraries(cache)
    kept = {path: path.stat().st_size for path in found}
    for path, size in kept.items():
        os.truncate(path, int(left * size))
    told = serve(script, cache)
    for path in libraries(cache):
        if path.stat().st_size == kept[path]:
            assert f"{path} is not whole" in told
    assert any(
        path.name.endswith(".main.so") and path.stat().st_size == kept[path] for path in found
    )
    assert "not whole" not in serve(script, cache)
    shutil.rmtree(cache)
