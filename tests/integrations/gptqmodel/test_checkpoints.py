"""GPTQ's and AWQ's checkpoints as transformers loads them: into linears of gptqmodel, which have no
weight, and choose a kernel in their first call. `make test-gptqmodel` installs it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import oracle
import peft
import pytest
import torch
import transformers
from dense_merge import REFERENCE, Case, build_case, check_mixed, error
from packed_integers import AwqLinear, GptqLinear, PackedLinear
from safetensors.torch import save_file
from tiny_models import token_inputs
from torch import nn

import lorafx

gptqmodel = pytest.importorskip("gptqmodel")

GROUP = 32
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "sym": False, "checkpoint_format": "gptq"},
    "gptq in activation order": {"quant_method": "gptq", "sym": False, "desc_act": True},
    "awq": {"quant_method": "awq", "zero_point": True, "version": "gemm"},
}
NAMES = ["a1", None, "a0", "a3"]
Load = Callable[..., Any]


class InOrder(GptqLinear):
    groups = AwqLinear.groups


def _packed(kind: str, linear: nn.Linear) -> PackedLinear:
    cls = AwqLinear if kind == "awq" else GptqLinear if "order" in kind else InOrder
    packed = cls(linear, GROUP)
    packed.scales = packed.scales.half()
    return packed


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Load]:
    """The case of the dense model that the checkpoint stands for, and what loads it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    case = build_case("llama", folder, **SIZES)
    state: dict[str, torch.Tensor] = {}
    for path, module in case.base.named_modules():
        if isinstance(module, nn.Linear) and "layers" in path:
            packed = _packed(request.param, module)
            buffers = {f"{path}.{name}": value for name, value in packed.named_buffers()}
            state |= {key: value.contiguous() for key, value in buffers.items()}
            # The library multiplies in the dtype of the scales.
            module.weight.data = packed.dequantized().half().float()
    dense = case.base.state_dict().items()
    layers = {key.rpartition(".")[0] for key in state}
    state |= {key: value.clone() for key, value in dense if key.rpartition(".")[0] not in layers}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config: Any = case.base.config

    def load(dtype: torch.dtype, **quantisation: Any) -> Any:
        settings = {**config.to_dict(), "architectures": [type(case.base).__name__]}
        stored = {"bits": 4, "group_size": GROUP, **CONFIGS[request.param], **quantisation}
        settings["quantization_config"] = stored
        (folder / "config.json").write_text(json.dumps(settings))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.eval().requires_grad_(False)

    return case, load


def test_mixed_batches(loaded: tuple[Case, Load]) -> None:
    """In float32, on one graph whatever the mix; and no first call of a layer makes another."""
    case, load = loaded
    cm = lorafx.compile(load(torch.float32), case.folders, options=REFERENCE, dynamic=True)
    check_mixed(cm, case, NAMES, token_inputs(4, 5))
    check_mixed(cm, case, ["a4", "a4", None], token_inputs(3, 7))
    assert cm.recompiles == 1
    fixed = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    inputs = token_inputs(4, 5)
    got = cm.generate(**inputs, adapter_names=NAMES, **fixed)
    for row, name in enumerate(NAMES):
        (want,) = case.alone(name).generate(**oracle.one_row(inputs, row), **fixed)
        assert torch.equal(got[row][: len(want)], want)


@pytest.mark.parametrize("lowering", ["reference", "inductor"])
def test_packed_kernels(loaded: tuple[Case, Load], lowering: str) -> None:
    """In bfloat16 the library packs the integers for torch's kernel in a layer's first call, which
    is before the first graph. The result is as near to fp64 as twice what W + ΔW in bfloat16 is."""
    case, load = loaded
    model = load(torch.bfloat16)
    cm = lorafx.compile(model, case.folders, options={"lowering": lowering})
    inputs = token_inputs(4, 5)
    got = cm(**inputs, adapter_names=NAMES)["logits"]
    assert cm.recompiles == 1
    cm(**inputs, adapter_names=["a3", "a3", "a0", None])
    assert cm.recompiles == 1
    for row, name in enumerate(NAMES):
        twin, one = copy.deepcopy(case.alone(name)), oracle.one_row(inputs, row)
        with torch.no_grad():
            true = twin.double()(**one).logits[0]
            dense = twin.bfloat16()(**one).logits[0]
        assert error(got[row], true) <= 2 * error(dense, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_weight(loaded: tuple[Case, Load], dtype: torch.dtype) -> None:
    """It is read from whichever layout the kernel has, and not written."""
    case, load = loaded
    model = load(dtype)
    path = "model.layers.0.mlp.down_proj"
    before = lorafx.dequantize(model.get_submodule(path))
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    weight = lorafx.dequantize(model.get_submodule(path))
    rounding = 0 if dtype == torch.float32 else 2**-8
    for found in (before, weight):
        want = case.base.get_submodule(path).weight
        assert error(found.float(), want) <= (0 if found is before else rounding)
    with pytest.raises(lorafx.MatchError, match=r"nothing (is merged|has changed)"):
        cm.merge("a1", requantize=True)
    assert torch.equal(lorafx.dequantize(model.get_submodule(path)), weight)


def test_a_peft_model(loaded: tuple[Case, Load]) -> None:
    """PEFT's wrappers of such linears are taken off, and its adapter is served."""
    case, load = loaded
    wrapped = peft.PeftModel.from_pretrained(load(torch.float32), case.folders["a1"], "a1")
    cm = lorafx.compile(wrapped, options=REFERENCE)
    check_mixed(cm, case, ["a1", None, "a1"], token_inputs(3, 5))


def test_a_kernel_that_breaks_graphs(loaded: tuple[Case, Load]) -> None:
    """As those for other than 4 bits do: each layer is many graphs, whose integers and scales are
    no copies of another layer's weight."""
    case, load = loaded
    if load(torch.float32).config.quantization_config.quant_method != "gptq":
        pytest.skip("AWQ's has none")
    model = load(torch.float32, backend="gptq_torch")
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    check_mixed(cm, case, NAMES, token_inputs(4, 5))
    assert cm.recompiles > 2
