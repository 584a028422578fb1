"""The backend lowered by Inductor: bit for bit without LoRA; modes; found by its entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from attached import attached, check, fresh_dynamo, graphs
from tiny_models import FAMILIES, PlainModel
from torch import Tensor, nn

import lorafx
from lorafx.errors import ConfigError
from lorafx.torch_internals.compat import mode_settings

__all__ = ["fresh_dynamo"]
MODES = (None, "default", "reduce-overhead", "max-autotune-no-cudagraphs")


def inference_and_gradients(backend: str, inputs: dict[str, Tensor], **kwargs: Any) -> list[Tensor]:
    """Logits without and with gradients wanted, and the gradients of all parameters."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = PlainModel().eval()
    call = torch.compile(model, backend=backend, **kwargs)
    with torch.no_grad():
        alone = call(**inputs)["logits"]
    wanted = call(**inputs)["logits"]
    wanted.square().mean().backward()
    return [alone, wanted.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), True])
def test_without_lora_it_is_inductor_bit_for_bit(dynamic):
    inputs = FAMILIES["plain"].inputs(4, 6)
    want = inference_and_gradients("inductor", inputs, dynamic=dynamic)
    got = inference_and_gradients("lorafx", inputs, dynamic=dynamic)
    assert len(got) == len(want) == 10
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_the_settings_that_inductor_has_for_it(plain, mode):
    """Both roads compile under them, and the base is Inductor's own in that mode."""
    torch.manual_seed(0)
    seen: list[tuple[bool, bool]] = []

    def look(graph: torch.fx.Graph) -> None:
        seen.append((inductor_config.max_autotune, inductor_config.triton.cudagraphs))

    model, inputs = lorafx.attach(plain.model(), plain.folders), FAMILIES["plain"].inputs(3, 4)
    call, own = (
        torch.compile(m, backend=b, mode=mode)
        for m, b in ((model, "lorafx"), (plain.model(), "inductor"))
    )
    with inductor_config.patch(post_grad_custom_pre_pass=look), torch.no_grad():
        got = call(**inputs)["logits"]
        check(call, model, plain, ["a0", None, "a1"], inputs)
        assert graphs(model) == len(seen) == 2
        assert torch.equal(got, own(**inputs)["logits"])
    settings = mode_settings(mode)
    wanted = settings.get("max_autotune", False), settings.get("triton.cudagraphs", False)
    assert set(seen) == {wanted}


def test_an_unknown_mode(plain):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Unrecognized mode=fastest"):
        torch.compile(plain.model(), backend="lorafx", mode="fastest")(
            **FAMILIES["plain"].inputs(1, 2)
        )


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.w(x)
        torch._dynamo.graph_break()
        return {"logits": self.w(h)}


def test_fullgraph_is_an_error_where_the_model_breaks(small):
    case = small(Broken, ["w"])
    model, inputs = attached(case), {"x": torch.randn(3, 2, 6)}
    whole = torch.compile(model, backend="lorafx", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"), torch.no_grad():
        whole(**inputs)
    check(torch.compile(model, backend="lorafx"), model, case, ["a", None, "b"], inputs)


PROCESS = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh()).eval()
x = torch.randn(4, 6)
assert "lorafx" not in sys.modules
assert "lorafx" in torch._dynamo.list_backends()
with torch.no_grad():
    got = torch.compile(model, backend="lorafx")(x)
    assert torch.equal(got, torch.compile(model)(x))
import lorafx
from lorafx.torch_compile.dynamo_backend import compile_frame
assert torch._dynamo.lookup_backend("lorafx") is compile_frame
assert "peft" not in sys.modules and "transformers" not in sys.modules
print("found")
"""


@pytest.mark.slow
def test_found_by_its_entry_point_without_an_import():
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "found\n"


def test_options_that_are_not_honoured_are_errors(plain):
    call = torch.compile(plain.model(), backend="lorafx", options={"max_autotune": True})
    with pytest.raises(ConfigError, match="unknown option 'max_autotune'"):
        call(**FAMILIES["plain"].inputs(1, 2))
