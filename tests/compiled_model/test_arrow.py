"""`lorafx.Arrow`: modules that choose adapters for each token, against PEFT's own model, by row."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import ArrowConfig, LoraConfig, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lorafx
from lorafx.adapter_store.names import Mixture

pytestmark = pytest.mark.any_sizes

VOCABULARY = 61


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def gpt2() -> nn.Module:
    """Its weights are transposed."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=VOCABULARY))


TARGETS = {llama: ["q_proj", "v_proj", "down_proj"], gpt2: ["c_fc"]}
SLOWLY = pytest.param(gpt2, marks=pytest.mark.slow)


class Routed:
    """A model with three adapters of rank 2 whose B A has a clear first direction, which PEFT's 15
    power iterations find."""

    def __init__(self, build, folder: Path, **options) -> None:
        torch.manual_seed(0)
        self.base, self.paths = build().eval(), {}
        for name in ("a", "b", "c"):
            peft_model = get_peft_model(
                copy.deepcopy(self.base),
                LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS[build]),
            )
            for key, parameter in peft_model.named_parameters():
                if "lora_A" in key:
                    nn.init.orthogonal_(parameter)
                elif "lora_B" in key:
                    nn.init.orthogonal_(parameter)
                    parameter.data *= torch.tensor([1.0, 0.05])
            self.paths[name] = str(folder / name)
            peft_model.save_pretrained(self.paths[name])
        config = lorafx.LoraConfig(max_rank=8, max_adapters=8)
        options = {"lowering": "reference", **options}
        self.cm = lorafx.compile(
            copy.deepcopy(self.base), config, adapters=self.paths, options=options
        )

    def peft(self, names: str, top_k: int, temperature: float, general: str = "") -> nn.Module:
        settings = {"top_k": top_k, "router_temperature": temperature, "rng_seed": 0}
        config = ArrowConfig(**settings, use_gks=bool(general))
        paths, more = ([self.paths[name] for name in items] for items in (names, general))
        return create_arrow_model(copy.deepcopy(self.base), paths, config, more).eval()


@pytest.fixture(scope="module", params=[llama, SLOWLY], ids=["llama", "gpt2"])
def routed(request, tmp_path_factory) -> Routed:
    return Routed(request.param, tmp_path_factory.mktemp("adapters"))


ONE_FAMILY = pytest.mark.parametrize("routed", [llama], indirect=True)


def inputs_of(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def test_rows_are_those_of_pefts_model(routed: Routed) -> None:
    wide, sharp = lorafx.Arrow(["a", "b", "c"], top_k=2), lorafx.Arrow(["c", "a"], 1, 0.5)
    inputs = inputs_of(4, 6)
    got = routed.cm(**inputs, adapter_names=[wide, None, "b", sharp])[0]
    by_name = routed.cm(**inputs, adapter_names=[None, None, "b", None])[0]
    torch.testing.assert_close(got[1:3], by_name[1:3], rtol=1e-5, atol=1e-5)
    for row, model in ((0, routed.peft("abc", 2, 1.0)), (3, routed.peft("ca", 1, 0.5))):
        want = model(input_ids=inputs["input_ids"][row : row + 1])[0]
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-5, atol=1e-5)
    assert (got[0] - by_name[0]).abs().max() > 1e-3
    before = routed.cm.recompiles
    routed.cm(**inputs_of(3, 7), adapter_names=["a", lorafx.Arrow(["b", "c", "a"], 2, 2.0), wide])
    assert routed.cm.recompiles == before


@pytest.mark.slow
@ONE_FAMILY
def test_a_batch_of_one_and_of_one_route(routed: Routed) -> None:
    arrow, model = lorafx.Arrow(["a", "b", "c"], 2, 0.7), routed.peft("abc", 2, 0.7)
    for rows in (1, 3):
        inputs = inputs_of(rows, 5)
        got = routed.cm(**inputs, adapter_names=[arrow] * rows)[0]
        with torch.no_grad():
            torch.testing.assert_close(got, model(**inputs)[0], rtol=1e-5, atol=1e-5)


@ONE_FAMILY
def test_general_knowledge_is_subtracted(routed: Routed) -> None:
    arrow, inputs = lorafx.Arrow(["a", "b"], 1, 0.7, general=["c"]), inputs_of(2, 5)
    got = routed.cm(**inputs, adapter_names=["a", arrow])[0]
    with torch.no_grad():
        model = routed.peft("ab", 1, 0.7, "c")
        want = model(input_ids=inputs["input_ids"][1:])[0]
    for layer in model.modules():  # beyond what PEFT's power iterations find, a choice is a toss
        if hasattr(layer, "lora_arrow"):
            assert _gap(layer) > 2
    torch.testing.assert_close(got[1:], want, rtol=1e-5, atol=1e-5)


def _gap(layer: nn.Module) -> float:
    """The ratio of the first two singular values of each adapter's B A, at least."""
    values = [
        torch.linalg.svdvals(layer.lora_B[name].weight @ layer.lora_A[name].weight)[:2]
        for name in ("task_0", "task_1")
    ]
    return min(float(first / second) for first, second in values)


@pytest.mark.slow
@ONE_FAMILY
def test_generating_and_the_default(routed: Routed) -> None:
    arrow, inputs = lorafx.Arrow(["a", "b"], 2, 0.3), inputs_of(3, 5)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = routed.cm.generate(**inputs, adapter_names=["c", arrow, None], **settings)
    own = {name: value[1:2] for name, value in inputs.items()}
    want = routed.peft("ab", 2, 0.3).generate(**own, **settings)
    assert torch.equal(got[1:2], want)
    routed.cm.set_adapter(arrow)
    assert torch.equal(routed.cm.generate(**inputs, **settings)[1:2], want)
    routed.cm.set_adapter(None)


@ONE_FAMILY
def test_adapters_that_change(routed: Routed) -> None:
    arrow, inputs = lorafx.Arrow(["a", "new"], 1), inputs_of(2, 4)
    with pytest.raises(lorafx.UnknownAdapterError, match="new"):
        routed.cm(**inputs, adapter_names=[arrow, None])
    for source in ("b", "c"):
        routed.cm.load_adapter(routed.paths[source], "new")
        got = routed.cm(**inputs, adapter_names=[arrow, None])[0]
        with torch.no_grad():
            want = routed.peft("a" + source, 1, 1.0)(input_ids=inputs["input_ids"][:1])[0]
        torch.testing.assert_close(got[:1], want, rtol=1e-5, atol=1e-5)
    routed.cm.unload_adapter("new")
    assert set(routed.cm.adapters) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ab",), "lists of names"),
        ((["a", {"a": 1.0}],), "lists of names"),
        ((["a"], 1, 1.0, ["a"]), "different adapters"),
        (([],), "1 to 16 different adapters"),
        ((["a", "a"],), "1 to 16 different adapters"),
        ((["a", "b"], 3), "top_k=3; give a number of its adapters, 1 to 2"),
        ((["a", "b"], True), "top_k=True"),
        ((["a", "b"], 1, 0.0), r"temperature=0\.0"),
        ((["a", "b"], 1, 1e-300), "temperature=1e-300; give a number above 0"),
        ((["a", "b"], 1, 1e300), r"temperature=1e\+300"),
        ((["a", "b"], 1, float("nan")), "temperature=nan"),
        ((["a", "b"], 1, float("inf")), "temperature=inf"),
    ],
)
def test_arguments_are_checked(arguments, message: str) -> None:
    with pytest.raises(lorafx.ConfigError, match=message):
        lorafx.Arrow(*arguments)


@ONE_FAMILY
def test_a_route_is_no_adapter(routed: Routed, tmp_path: Path) -> None:
    arrow, inputs, cm = lorafx.Arrow(["a", "b"], 1), inputs_of(2, 3), routed.cm
    want = cm(**inputs, adapter_names=[arrow, None])[0]
    for action in (cm.merge, partial(cm.export_merged, folder=tmp_path)):
        with pytest.raises(lorafx.MatchError, match="chooses adapters for each token, so no"):
            action(arrow)
    assert cm.merged is None
    for name in (arrow, lorafx.Arrow(["a", "c"], 1)):
        with pytest.raises(lorafx.ConfigError, match="and no sum or route"):
            cm.load_adapter(routed.paths["c"], name)
    assert torch.equal(cm(**inputs, adapter_names=[arrow, None])[0], want)


@pytest.mark.slow
@ONE_FAMILY
def test_waves_have_slots_for_what_routes_choose_from(routed: Routed) -> None:
    few = lorafx.compile(
        copy.deepcopy(routed.base),
        lorafx.LoraConfig(max_rank=8, max_adapters=3),
        adapters=routed.paths,
        options={"lowering": "reference", "overflow": "waves"},
    )
    inputs = inputs_of(5, 4)
    names = [lorafx.Arrow(["a", "b"], 1), "c", lorafx.Arrow(["c", "b"], 2), None, "a"]
    want = routed.cm(**inputs, adapter_names=names)[0]
    got = few(**inputs, adapter_names=names)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_route_is_a_value() -> None:
    arrow = lorafx.Arrow(["a", "b"], 1, 0.5, ["c"])
    assert arrow == pickle.loads(pickle.dumps(arrow)) != lorafx.Arrow(["a", "b"], 1, 0.5)
    arrow = lorafx.Arrow(["a", "b"], 1, 0.5)
    assert arrow == lorafx.Arrow(("a", "b"), 1, 0.5) == pickle.loads(pickle.dumps(arrow))
    assert len({arrow, lorafx.Arrow(["a", "b"], 2, 0.5), lorafx.Arrow(["b", "a"], 1, 0.5)}) == 3
    assert str(arrow) == "arrow(1 of a, b at 0.5)"


@ONE_FAMILY
def test_what_is_refused(routed: Routed, tmp_path: Path) -> None:
    arrow, inputs, cm = lorafx.Arrow(["a", "b"], 1), inputs_of(2, 3), routed.cm
    gates = torch.zeros(2, 3, 1, dtype=torch.int64), torch.rand(2, 3, 1)
    for more in (
        {"adapter_slots": torch.tensor([[0, 0, -1], [0, 0, 0]])},
        {"adapter_gates": gates},
    ):
        with pytest.raises(lorafx.BatchError, match=r"arrow\(1 of a, b.*no part in adapter_slots"):
            cm(**inputs, adapter_names=[arrow], **more)
    for name, config, message in (
        ("dora", {"target_modules": ["q_proj"], "use_dora": True}, "'dora' is a DoRA adapter"),
        ("less", {"target_modules": ["q_proj"]}, "'less' has nothing at model.layers.0"),
        ("ids", {"target_modules": ["embed_tokens"]}, "nothing at|no linear alone"),
    ):
        wrapped = get_peft_model(copy.deepcopy(routed.base), LoraConfig(r=2, **config))
        wrapped.save_pretrained(tmp_path / name)
        other = lorafx.compile(
            copy.deepcopy(routed.base),
            {"a": routed.paths["a"], name: str(tmp_path / name)},
            options={"lowering": "reference"},
        )
        with pytest.raises(lorafx.ConfigError, match=message):
            other(**inputs, adapter_names=[lorafx.Arrow(["a", name], 1), None])
        if name == "dora":  # beside a route, a row would lose its magnitudes
            with pytest.raises(lorafx.ConfigError, match="a batch with a route: 'dora' is a DoRA"):
                other(**inputs, adapter_names=[lorafx.Arrow(["a"], 1), "dora"])


def test_a_pinned_route_keeps_its_adapters(tmp_path: Path) -> None:
    """Under any number of other adapters and sums, until it is unpinned."""
    routed = Routed(llama, tmp_path)
    cm, store = routed.cm, routed.cm._session.store
    for route in (
        lorafx.Arrow(["a", "b"], top_k=1),
        lorafx.Arrow(["a", "b"], top_k=1, general=["c"]),
    ):
        cm.pin_adapter("a")
        cm.pin_adapter(route)
        kept = {"a", route, *route.experts}
        for weight in range(1, 9):
            store.acquire([Mixture({"c": weight / 16})])
        assert store.evictions > 0
        assert store.pinned == kept <= store.resident.keys()
        cm.unpin_adapter(route)
        assert store.pinned == {"a"}
