"""Shortcuts change no bit: with each of them off, with all off and with all on, models answer the
same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_merge import TOLERANCE, Case, build_case, error
from layer_changes import activation, constant, dtype, hook
from stacks import LAYERS, Block, H, Stack, case_of, stack
from tiny_models import VOCAB, Family, token_inputs
from torch import Tensor, fx, nn
from transformers import StaticCache

from lorafx.capture import lowering
from lorafx.capture.written_back import write_back
from lorafx.torch_internals.shortcuts import SHORTCUTS

NAMES = ["a0", None, "a1"]
ALL = list(SHORTCUTS)
#: What is on, by a name for the setting. Only Inductor's lowerings ask for the last two shortcuts.
SETTINGS = {
    "all off": [],
    **{f"without {name}": [other for other in ALL if other != name] for name in ALL},
}
OF_CAPTURE = ["all off", "without stamps", "without needless_guards"]

#: Calls a compiled model, and returns all that it has made.
Calls = Callable[[Any], Sequence[Tensor]]


def settings(names: Sequence[str]) -> list[Any]:
    """Parameters of a test, of which `make test` runs the first: all off."""
    return [
        pytest.param(SETTINGS[n], id=n, marks=[pytest.mark.slow] * bool(i))
        for i, n in enumerate(names)
    ]


every_setting = pytest.mark.parametrize("on", settings(OF_CAPTURE))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def compare(case: Case, on: Sequence[str], calls: Calls, **options: Any) -> list[Tensor]:
    """The same bits with all shortcuts as with those that are named; returns them."""
    answers = []
    for names in (ALL, on):
        torch._dynamo.reset()
        torch.manual_seed(0)
        cm = case.compile({"shortcuts": list(names), **options}, dynamic=False)
        answers.append(list(calls(cm)))
    with_all, without = answers
    assert len(with_all) == len(without) > 0
    assert all(torch.equal(*pair) for pair in zip(with_all, without, strict=True))
    return with_all


def twice(inputs: dict[str, Tensor]) -> Calls:
    """A mixed batch, and another one of the same sizes."""

    def calls(cm: Any) -> list[Tensor]:
        return [
            cm(**inputs, adapter_names=names)["logits"] for names in (NAMES, ["a1", "a2", None])
        ]

    return calls


_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_TARGETS = (["q_proj", "v_proj"], "all-linear", ["o_proj"], ["k_proj"], ["lm_head"])


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**_SIZES, **_EXPERTS, num_hidden_layers=2)
    return transformers.Qwen3MoeForCausalLM(config)


def qwen3_next() -> nn.Module:
    config = transformers.Qwen3NextConfig(
        **_SIZES,
        **_EXPERTS,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        mlp_only_layers=list(range(4)),
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=6,
        linear_value_head_dim=5,
    )
    return transformers.Qwen3NextForCausalLM(config)


FAMILIES: dict[str, Any] = {
    "llama": "llama",
    "qwen3_moe": Family(qwen3_moe, _TARGETS),
    "qwen3_next": Family(qwen3_next, _TARGETS),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    cases: dict[str, Case] = {}

    def of(family: str) -> Case:
        if family not in cases:
            cases[family] = build_case(FAMILIES[family], tmp_path_factory.mktemp(family))
        return cases[family]

    return of


@every_setting
@pytest.mark.parametrize(
    "family", ["llama", "qwen3_moe", pytest.param("qwen3_next", marks=pytest.mark.slow)]
)
def test_models_of_transformers(made: Callable[[str], Case], family: str, on: list[str]) -> None:
    case, inputs = made(family), token_inputs(3, 5)
    first, _ = compare(case, on, twice(inputs))
    want = case.expected(NAMES, inputs)
    valid = inputs["attention_mask"].bool()
    assert error(first[valid], want[valid]) <= TOLERANCE


@every_setting
@pytest.mark.slow
def test_generate_with_a_static_cache(made: Callable[[str], Case], on: list[str]) -> None:
    inputs = {**token_inputs(3, 5), "max_new_tokens": 3, "do_sample": False}
    inputs |= {"output_logits": True, "return_dict_in_generate": True}

    def calls(cm: Any) -> list[Tensor]:
        found = cm.generate(**inputs, cache_implementation="static", adapter_names=NAMES)
        return [found.sequences, *found.logits]

    compare(made("llama"), on, calls)


@pytest.mark.parametrize("on", settings(list(SETTINGS)))
@pytest.mark.slow
def test_inductor_with_a_static_cache(
    made: Callable[[str], Case], on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def noting(gm: fx.GraphModule) -> int:
        written.append(write_back(gm))
        return written[-1]

    monkeypatch.setattr(lowering, "write_back", noting)
    case = made("llama")
    ids = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))

    def calls(cm: Any) -> list[Tensor]:
        past = StaticCache(config=cm.model.config, max_cache_len=9)
        past.early_initialization(3, 2, 6, torch.float32, torch.device("cpu"))
        given = {"past_key_values": past, "adapter_names": NAMES}
        found = [cm(input_ids=part, **given).logits for part in ids.split(1, dim=1)]
        for layer in past.layers:
            found += [layer.keys, layer.values]
        return found

    found = compare(case, on, calls, lowering="inductor")
    assert written == [4] * (1 + ("written_back" in on))  # keys and values of two layers
    want = case.expected(NAMES, {"input_ids": ids})
    assert error(torch.cat(found[:5], 1), want) <= TOLERANCE


class Broken(Stack):
    """Breaks its graph in the middle."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.layers[1](self.layers[0](x))
        torch._dynamo.graph_break()
        return {"logits": self.layers[3](self.layers[2](x))}


class Appends(Block):
    """Notes what it returns in a list of the model's."""

    seen: list[Tensor] | None = None

    def forward(self, h: Tensor) -> Tensor:
        y = super().forward(h)
        if self.seen is not None:
            self.seen.append(y)
        return y


class Listing(Stack):
    """Returns what the layers that note something have noted."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        seen: list[Tensor] = []
        for layer in self.layers:
            if layer.seen is not None:
                layer.seen = seen
        y = super().forward(x)["logits"]
        return {"logits": y + torch.stack(seen).sum(0)}


class Caching(Block):
    """Adds to a cache of its own what passes, and reads it."""

    def forward(self, h: Tensor, cache: Tensor) -> Tensor:
        cache.add_(h.square().mean((1, 2)).to(cache.dtype))
        return super().forward(h) * (1 + cache.to(h.dtype))[:, None, None]


class Cached(Stack):
    def forward(self, x: Tensor, caches: list[Tensor]) -> dict[str, Tensor]:
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache)
        return {"logits": x}


def of_stack(base: nn.Module, folder: Path) -> Case:
    return case_of(base.eval().requires_grad_(False), folder)


def rows() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 5, H, generator=torch.Generator().manual_seed(1))}


def mixed(cm: Any) -> list[Tensor]:
    return [cm(**rows(), adapter_names=NAMES)["logits"] for _ in range(2)]


def check_oracle(case: Case, got: Tensor) -> None:
    assert error(got, case.expected(NAMES, rows())) <= TOLERANCE


@every_setting
@pytest.mark.parametrize("change", [constant, activation, hook, dtype])
def test_a_layer_that_differs(
    tmp_path: Path, change: Callable[[nn.Module], Any], on: list[str]
) -> None:
    case = stack(tmp_path, change)
    check_oracle(case, compare(case, on, mixed)[0])


@every_setting
def test_a_model_with_graph_breaks(tmp_path: Path, on: list[str]) -> None:
    torch.manual_seed(0)
    case = of_stack(Broken(), tmp_path)
    check_oracle(case, compare(case, on, mixed)[0])


@every_setting
@pytest.mark.parametrize("which", [[1], range(LAYERS)], ids=["one", "all"])
def test_a_layer_that_appends_to_a_list(
    tmp_path: Path, which: Sequence[int], on: list[str]
) -> None:
    torch.manual_seed(0)
    base = Listing(Appends)
    for index in which:
        base.layers[index].seen = []  # type: ignore[assignment]
    case = of_stack(base, tmp_path)
    check_oracle(case, compare(case, on, mixed)[0])


@every_setting
def test_a_cache_of_another_kind(tmp_path: Path, on: list[str]) -> None:
    torch.manual_seed(0)
    case = of_stack(Cached(Caching), tmp_path)

    def calls(cm: Any) -> list[Tensor]:
        caches = [torch.zeros(3) for _ in range(LAYERS)]
        caches[2] = caches[2].double()
        answers = [cm(**rows(), caches=caches, adapter_names=NAMES)["logits"] for _ in range(2)]
        return [*answers, *caches]

    found = compare(case, on, calls)
    for row, name in enumerate(NAMES):
        caches = [torch.zeros(1) for _ in range(LAYERS)]
        caches[2] = caches[2].double()
        with torch.no_grad():
            want = case.alone(name)(rows()["x"][row : row + 1], caches)["logits"]
        assert error(found[0][row : row + 1], want) <= TOLERANCE


@every_setting
def test_an_attribute_that_changes_after_the_first_call(tmp_path: Path, on: list[str]) -> None:
    case = stack(tmp_path)

    def calls(cm: Any) -> list[Tensor]:
        before = cm(**rows(), adapter_names=NAMES)["logits"]
        constant(cm.model.layers[2])
        after = cm(**rows(), adapter_names=NAMES)["logits"]
        hook(cm.model.layers[1])
        return [before, after, cm(**rows(), adapter_names=NAMES)["logits"]]

    first, second, third = compare(case, on, calls)
    check_oracle(case, first)
    case.merged.clear()
    constant(case.base.layers[2])  # type: ignore[index]
    check_oracle(case, second)
    case.merged.clear()
    hook(case.base.layers[1])  # type: ignore[index]
    check_oracle(case, third)
