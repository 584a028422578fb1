"""The first hour of a new user: the wheel, installed outside of the checkout, and a notebook of
habits (notebook.py) that runs there."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from waiting import LONG

ROOT = Path(__file__).parents[2]

#: torch finds the backend by the entry point, before anything of lorafx is imported.
BACKEND = """
import sys, torch
assert "lorafx" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
assert "lorafx" not in sys.modules
linear = torch.nn.Linear(3, 3)
compiled = torch.compile(linear, backend="lorafx", options={"lowering": "reference"})
assert torch.equal(compiled(torch.ones(1, 3)), linear(torch.ones(1, 3)))
import lorafx.kernels.cpu.cpu_source, lorafx.passes.fuse
print(lorafx.__file__)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of its own with lorafx from a wheel, and all else from where this one has it."""
    home = tmp_path_factory.mktemp("user")
    source = home / "source"
    source.mkdir()
    for name in ("lorafx", "passes", "kernels"):  # the first has links to the other two
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=left_out)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip")
    build = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(home), str(source))
    subprocess.run([*pip, *build], check=True, timeout=LONG)
    shutil.rmtree(source)
    venv.create(home / "venv", with_pip=False, symlinks=True)
    own = home / "venv" / "bin" / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(home / "venv")})
    # Lines of a .pth file are folders; the .pth files in these, of editable installs, are not read.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(packages) / "others.pth").write_text("\n".join([*others, *site.getsitepackages()]))
    [wheel] = home.glob("lorafx-*.whl")
    install = ("install", "-q", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
    subprocess.run([own, "-m", "pip", *install], check=True, timeout=LONG)
    return own


def run(*command: object) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=LONG,
        cwd="/",
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.slow
def test_the_wheel_has_its_backend_and_its_command(python: Path) -> None:
    package = python.parents[1] / "lib"
    assert run(python, "-c", BACKEND).startswith(str(package))
    assert run(python.with_name("lorafx"), "--version").startswith("lorafx 0.")
    assert run(python, "-m", "lorafx", "--version") == run(python.with_name("lorafx"), "--version")


@pytest.mark.slow
def test_habits_of_other_libraries_are_served_or_refused_with_the_way_out(python: Path) -> None:
    said = run(python, Path(__file__).with_name("notebook.py"), ROOT / "examples")
    assert said.startswith(f"CompiledModel( {python.parents[1]}")
