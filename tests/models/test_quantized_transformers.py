"""Bases quantised by transformers as they are loaded, and PEFT models over them taken over."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
import transformers
from dense_merge import REFERENCE, PeftCase, check_mixed, error
from expert_models import experts_modules, ids, moe_base
from quantised import ROUNDS, Rounded, adapters, small_base
from torch import nn

import lorafx
from lorafx.model.quantized import is_stored
from lorafx.registry import lookup

NAMES = ["a", None, "b", "a"]


def of_torchao() -> Any:
    library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return transformers.TorchAoConfig(library.Int8WeightOnlyConfig())


def of_bitsandbytes(**settings: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return transformers.BitsAndBytesConfig(**settings)


#: What users pass as quantization_config; LLM.int8's threshold for outliers is 6 by default.
CONFIGS: dict[str, Callable[[], Any]] = {
    "torchao-int8": of_torchao,
    "bitsandbytes-8": lambda: of_bitsandbytes(load_in_8bit=True),
    "bitsandbytes-nf4": lambda: of_bitsandbytes(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, dict[str, Path]]:
    base, folder = small_base(), tmp_path_factory.mktemp("saved")
    base.save_pretrained(folder / "base")
    return base, folder / "base", adapters(base, folder)


def load(folder: Path, kind: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=CONFIGS[kind](),
            device_map="cpu",
            dtype=torch.float32,
        )
    return model.eval().requires_grad_(False)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"input_ids": torch.randint(3, 61, (len(NAMES), 5), generator=generator)}


@pytest.mark.parametrize(
    "kind",
    [
        "torchao-int8",
        pytest.param("bitsandbytes-nf4", marks=pytest.mark.slow),
        pytest.param("bitsandbytes-8", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("in_eager_mode")
def test_loaded_quantised_then_a_peft_model_of_it(
    kind: str, saved: tuple[nn.Module, Path, dict[str, Path]]
) -> None:
    base, folder, folders = saved
    model, given = load(folder, kind), inputs()
    quantiser, config = model.hf_quantizer, model.config.quantization_config
    with torch.no_grad():
        model(**given)
    tolerance = 1e-5 if kind == "torchao-int8" else ROUNDS
    want = Rounded(base, model, folders).rows(list(NAMES), given)
    cm = lorafx.compile(model, folders, options=REFERENCE)
    got = cm(**given, adapter_names=NAMES).logits
    assert error(got, want) <= tolerance
    with torch.no_grad():
        alone = model(input_ids=given["input_ids"][1:2]).logits[0]
    # LLM.int8 looks for columns of outliers in the whole batch, whoever's they are.
    assert error(got[1], alone) <= (ROUNDS if kind == "bitsandbytes-8" else 1e-5)
    assert error(got[0], want[1]) > 2 * tolerance
    assert model.hf_quantizer is quantiser
    assert model.config.quantization_config is config
    tokens = cm.generate(given["input_ids"], adapter_names=NAMES, max_new_tokens=2, do_sample=False)
    assert torch.equal(tokens[:, 5], got[:, -1].argmax(-1))
    cm.detach()

    wrapped = peft.PeftModel.from_pretrained(model, str(folders["a"]), adapter_name="a").eval()
    wrapped.load_adapter(str(folders["b"]), "b")
    layer = wrapped.base_model.model.model.layers[0].mlp.down_proj
    assert isinstance(layer, peft.tuners.lora.LoraLayer)
    wrapped.set_adapter("a")
    with torch.no_grad():
        theirs = wrapped(**given).logits
    cm = lorafx.compile(wrapped, options=REFERENCE)
    assert cm._orig_mod.model.layers[0].mlp.down_proj is layer.base_layer
    assert error(cm(**given, adapter_names=["a"] * 4).logits, theirs) <= tolerance
    assert error(cm(**given, adapter_names=NAMES).logits, got) <= tolerance
    cm.detach()
    assert wrapped.base_model.model.model.layers[0].mlp.down_proj is layer


@pytest.mark.parametrize(
    "kind", ["torchao-int8", pytest.param("bitsandbytes-nf4", marks=pytest.mark.slow)]
)
def test_experts_beside_quantised_linears(kind: str, tmp_path: Path) -> None:
    """transformers quantises linears alone, so 3-D experts stay as they are, and carry adapters."""
    base = moe_base("mixtral")
    base.save_pretrained(tmp_path / "base")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    folders = {
        name: oracle.save_adapter(
            base,
            tmp_path / name,
            rank=rank,
            targets=[p for p in oracle.linears(base) if p.endswith("q_proj")],
            seed=rank,
            target_parameters=parameters[: 3 - rank],
        )
        for name, rank in (("a", 1), ("b", 2))
    }
    model = load(tmp_path / "base", kind)
    ((_, experts),) = experts_modules(model)
    assert experts.down_proj.dtype == torch.float32
    projection = next(m for path, m in model.named_modules() if path.endswith("q_proj"))
    assert is_stored(projection, lookup(projection))
    case = PeftCase(model, folders)
    cm = case.compile()
    check_mixed(cm, case, NAMES, ids(len(NAMES)))
