"""What importing lorafx brings with it: nothing that costs time before it is used, and no library
that serving may do without."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lorafx

LAZY = """
import sys
import lorafx
heavy = {"torch._dynamo", "torch._inductor", "triton", "networkx", "transformers", "jinja2"}
def check(what, *others):
    found = {*heavy, *others} & set(sys.modules)
    if found:
        sys.exit(f"{what} imports {sorted(found)}")
check("import lorafx", "torch", "numpy", "typer")
from lorafx.integrations.cli import main
sys.argv = ["lorafx", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
check("lorafx --help", "torch", "numpy")
import torch
heavy -= set(sys.modules)
lorafx.Options(lowering="reference"), lorafx.LoraConfig(), lorafx.CaptureError, lorafx.errors
lorafx.AdapterSource("folder")
check("a configuration")
from torch import nn
lorafx.register
from lorafx.registry import lookup
lookup(nn.Linear(2, 2)); lookup(nn.ReLU())
heavy = {"transformers", "peft", "torchao", "bitsandbytes"}
check("looking up a class")
for name in lorafx.__all__:
    getattr(lorafx, name)
check("lorafx")
assert callable(lorafx.explain) and callable(lorafx.pipeline)
"""


def test_importing_lorafx_imports_what_it_needs_on_demand() -> None:
    subprocess.run([sys.executable, "-c", LAZY], check=True, timeout=120)


@pytest.mark.quick
def test_the_names_of_the_package() -> None:
    assert set(lorafx.__all__) <= set(dir(lorafx))
    with pytest.raises(AttributeError, match="'lorafx' has no attribute 'compiled'"):
        _ = lorafx.compiled
    known = [value for value in vars(lorafx.errors).values() if isinstance(value, type)]
    errors = {cls.__name__ for cls in known if issubclass(cls, Exception)}
    assert errors <= set(lorafx.__all__)
