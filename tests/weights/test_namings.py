"""New random weights pushed under every naming, with adapters on: dense merge into the new base."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
import torch
import transformers
from dense_merge import TOLERANCE, Case, error
from expert_models import experts_modules
from namings import DENSE, EXPERTS, State, new_weights
from torch import nn

import lorafx

pytestmark = pytest.mark.usefixtures("fixed_sizes")

SEEDS = itertools.count(11)
NAMES = ["a", None, "b"]
#: Its loop over experts breaks the graph into many, by which tokens go where: only its weights are
#: compared. What Step-3 checkpoints become is served in test_packed_weights.
LOOP = "step3p7"
VISION = "qwen3_vl_moe"
SERVED = ["qwen3_moe", "deepseek_v3"]
SLOW = ["qwen3_5_moe_text", VISION]


def base_of(model_type: str) -> nn.Module:
    """A tiny model; no weight of its experts is square, which could be stored either way."""
    named: Any = {
        "qwen3_vl_moe": transformers.Qwen3VLMoeForConditionalGeneration,
        "step3p7": transformers.Step3p7ForConditionalGeneration,
    }.get(model_type)
    config = tiny.shrink(transformers.CONFIG_MAPPING[model_type])
    text = config.get_text_config()
    text.moe_intermediate_size = 24
    if model_type == LOOP:
        text.sliding_window = 8
        text.mlp_layer_types = ["dense", "sparse"]
    if model_type in ("qwen3_moe", "qwen3_vl_moe", "deepseek_v3"):
        text.num_hidden_layers, text.first_k_dense_replace = 1, 0
    torch.manual_seed(0)
    model = named(config) if named else transformers.AutoModelForCausalLM.from_config(config)
    tiny.randomise(model.eval().requires_grad_(False))
    return model


@dataclass
class Served:
    """A compiled model, the base that its weights were last taken from, and its adapters."""

    cm: Any
    base: nn.Module
    folders: dict[str, Path]
    names: list[str | None]

    def check(self) -> None:
        """Its mixed batch is that of dense merge into `base`."""
        if not self.names:
            return
        inputs = {"input_ids": torch.randint(5, 100, (len(self.names), 5))}
        got = self.cm(**inputs, adapter_names=self.names)["logits"]
        want = Case(self.base, self.folders).expected(self.names, inputs)
        assert error(got, want) <= TOLERANCE

    def push(self, naming: Callable[[nn.Module], State], *, once: bool) -> None:
        """New weights under this naming, in any order; all at once, or `once` as a generator."""
        before = {name: t.data_ptr() for name, t in self.cm.model.state_dict().items()}
        graphs = self.cm.recompiles
        self.base = new_weights(self.base, next(SEEDS))
        pairs = list(naming(self.base).items())
        random.Random(len(pairs)).shuffle(pairs)
        report = self.cm.load_weights((pair for pair in pairs) if once else pairs)
        assert not report.missing
        after = self.cm.model.state_dict()
        for name, tensor in self.base.state_dict().items():
            assert torch.equal(after[name], tensor), name
        assert {name: tensor.data_ptr() for name, tensor in after.items()} == before
        self.check()
        assert self.cm.recompiles == graphs


@pytest.fixture(
    scope="module",
    params=[
        *((model_type, True) for model_type in SERVED),
        *((model_type, False) for model_type in (*SLOW, LOOP)),
        *(pytest.param((model_type, True), marks=pytest.mark.slow) for model_type in SLOW),
    ],
    ids=lambda param: f"{param[0]} {'served' if param[1] else 'weights'}",
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A model of each family, compiled once, with two adapters on the language model; on routed
    experts too where LoRA runs there. Of slow ones the weights alone are compared as well."""
    model_type, serve = request.param
    base = base_of(model_type)
    folder = tmp_path_factory.mktemp(model_type)
    linears = [
        path for path in oracle.linears(base) if "visi" not in path and not path.endswith("lm_head")
    ]
    experts = (
        {}
        if model_type == VISION
        else {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    )
    folders = {
        "a": oracle.save_adapter(base, folder / "a", rank=3, targets=linears, seed=1),
        "b": oracle.save_adapter(
            base, folder / "b", rank=2, targets=linears[:1], seed=2, **experts
        ),
    }
    model = new_weights(base, 5)
    cm = lorafx.compile(model, folders, options={"lowering": "reference"})
    served = Served(cm, new_weights(base, 5), folders, NAMES if serve else [])
    served.check()  # captures the graph
    return served


@pytest.mark.parametrize("naming", [*DENSE, *EXPERTS])
def test_round_trip(served: Served, naming: str) -> None:
    assert any(True for _ in experts_modules(served.base))
    served.push({**DENSE, **EXPERTS}[naming], once=naming in ("older", "per expert", "halves"))
