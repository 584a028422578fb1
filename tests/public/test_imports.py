"""What importing lorafx brings with it: no library that serving may do without."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import lorafx
from torch import nn
from lorafx.registry import lookup
lookup(nn.Linear(2, 2)); lookup(nn.ReLU())
found = {"transformers", "peft", "torchao", "bitsandbytes"} & set(sys.modules)
sys.exit(f"imported: {found}" if found else 0)
"""


def test_importing_lorafx_and_looking_up_classes_import_no_other_library() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120)
