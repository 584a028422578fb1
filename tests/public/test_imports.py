"""What importing lorafx brings with it: nothing that costs time before it is used, and no library
that serving may do without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hand_made import random_factors
from waiting import LONG

import lorafx

LAZY = """
import signal, sys
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
define = torch.library.Library.define
def interrupted(library, *arguments, **named):
    result = define(library, *arguments, **named)
    if library.ns == "lorafx":
        torch.library.Library.define = define
        signal.raise_signal(signal.SIGINT)
    return result
torch.library.Library.define = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    lorafx.compile
    sys.exit("nothing was interrupted")
except KeyboardInterrupt:
    pass
for name in lorafx.__all__:
    getattr(lorafx, name)
check("lorafx")
assert lorafx.compile.__name__ == "compile"
assert callable(lorafx.explain) and callable(lorafx.pipeline)
"""


def test_importing_lorafx_imports_what_it_needs_on_demand() -> None:
    """And an interrupt while operators are defined leaves no half of them."""
    subprocess.run([sys.executable, "-c", LAZY], check=True, timeout=LONG)


#: What compiles, looks inside or serves otherwise than by calls.
LATER = (
    "lorafx.bisection",
    *(f"lorafx.capture.{name}" for name in ("backend", "driver", "executable", "lowering")),
    *("lorafx.capture.record", "lorafx.capture.saved_graphs.saved_graphs", "lorafx.capture.traced"),
    *("lorafx.generation.continuous", "lorafx.inspection", "lorafx.kernels.triton"),
    *("lorafx.pass_order", "lorafx.passes.lower", "lorafx.passes.match"),
    *("networkx", "torch._functorch.aot_autograd", "torch._inductor.codecache"),
    *("torch._inductor.codegen", "torch._inductor.compile_fx"),
)
LATE = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
folder, *later = sys.argv[1:]
sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 16}
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval()
ids = torch.zeros(2, 3, dtype=torch.long)
with torch.no_grad():
    model(ids)
import lorafx
known = set(sys.modules)
options = {"lowering": "reference", "start": "eager"}
cm = lorafx.compile(model, {"a": folder}, options=options)
cm(ids, adapter_names=["a", None])
assert cm.recompiles == 0 and [kind.tier for kind in cm.status().kinds] == ["eager"]
found = [name for name in later if name in sys.modules] + [*sys.modules.keys() - known]
if found:
    sys.exit(f"a call that runs eagerly imports {found}")
cm.capture((ids,), {})
assert cm.recompiles and "lorafx.capture.backend" in sys.modules
"""


@pytest.mark.slow
def test_what_compiles_is_imported_with_the_first_graph(tmp_path: Path) -> None:
    """PEFT is not imported there: with torchao or bitsandbytes it imports Inductor."""
    random_factors(tmp_path, "model.layers.0.self_attn.q_proj", 8, 8)
    command = [sys.executable, "-c", LATE, str(tmp_path), *LATER]
    subprocess.run(command, check=True, timeout=LONG)


@pytest.mark.quick
def test_the_names_of_the_package() -> None:
    assert set(lorafx.__all__) <= set(dir(lorafx))
    with pytest.raises(AttributeError, match="'lorafx' has no attribute 'compiled'"):
        _ = lorafx.compiled
    known = [value for value in vars(lorafx.errors).values() if isinstance(value, type)]
    errors = {cls.__name__ for cls in known if issubclass(cls, Exception)}
    assert errors <= set(lorafx.__all__)
