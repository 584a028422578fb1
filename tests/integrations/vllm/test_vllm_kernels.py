"""lorafx's Triton kernels for vLLM's layers against vLLM's own, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPER = Path(__file__).parents[2] / "helpers" / "vllm_kernels.py"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_they_agree() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    run = subprocess.run(
        [sys.executable, str(HELPER), str(Path(spec.origin).parents[1])],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    differences = json.loads(run.stdout.splitlines()[-1])
    assert len(differences) == 6
    assert max(differences.values()) < 2e-3, differences
