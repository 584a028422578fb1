"""A tied head and embedding are two sites on one storage, each with its own delta: whose use of the
weight is whose, and what only looks like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from attached import EAGER
from dense_merge import REFERENCE, TOLERANCE, Case, check_mixed, error
from hand_made import hand_case
from tiny import randomise
from tiny_models import VOCAB, token_inputs
from torch import Tensor, nn

import lorafx
from lorafx import layers
from lorafx.config import LoraConfig
from lorafx.errors import MatchError
from lorafx.model.module_graph import ModuleGraph, storage_key
from lorafx.runtime.marking import build_sites

NAMES = ["both", "embed", None, "head", "both"]


class Parallel(nn.Module):
    """The same with lorafx's parallel layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = layers.VocabParallelEmbedding(VOCAB, 24)
        self.up = layers.ColumnParallelLinear(24, 24)
        self.lm_head = layers.ParallelLMHead(VOCAB, 24)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed_tokens(input_ids)
        return {"logits": self.lm_head(x + torch.tanh(self.up(x)))}


class Functional(Parallel):
    """The head is not called: its weight, which is the embedding's, is used."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed_tokens(input_ids)
        return {"logits": F.linear(x + torch.tanh(self.up(x)), self.lm_head.weight)}


def tied_case(build: Any, folder: Path) -> Case:
    torch.manual_seed(0)
    base = build()
    randomise(base)
    embed = "embed_tokens"
    assert base.lm_head.weight is base.get_submodule(embed).weight
    return hand_case(base, folder, both=[embed, "lm_head"], embed=[embed], head=["lm_head"])


@pytest.mark.parametrize("build", [Parallel, Functional])
def test_each_end_has_its_own_delta(tmp_path: Path, build: Any) -> None:
    """Adapters of both ends and of one alone, side by side in one batch."""
    case = tied_case(build, tmp_path)
    model = case.model()
    cm = lorafx.compile(model, case.folders, options=REFERENCE)
    inputs = token_inputs(5, 4)
    inputs["attention_mask"].fill_(1)
    check_mixed(cm, case, NAMES, inputs)
    # Still one parameter, which both ends hold.
    (holders,) = ModuleGraph(model).tied()
    assert sorted(item.path.rpartition(".")[2] for item in holders) == ["embed_tokens", "lm_head"]
    _, sites = build_sites(case.model(), LoraConfig(target_modules=["embed_tokens", "lm_head"]))
    assert [(site.path.rpartition(".")[2], site.eligible.kind) for site in sites] == [
        ("embed_tokens", "embedding"),
        ("lm_head", "linear"),
    ]
    assert len({storage_key(site.module.weight) for site in sites}) == 1


@pytest.mark.parametrize("name", ["embed", "head"])
def test_with_one_end_selected_the_other_is_the_base(tmp_path: Path, name: str) -> None:
    case = tied_case(Parallel, tmp_path)
    cm = lorafx.compile(case.model(), {name: case.folders[name]}, options=REFERENCE)
    assert "sites: 1\n" in str(cm.explain())
    inputs = token_inputs(3, 4)
    inputs["attention_mask"].fill_(1)
    check_mixed(cm, case, [name, None, name], inputs)


def test_eager_calls_as_well(tmp_path: Path) -> None:
    case = tied_case(Parallel, tmp_path)
    model = lorafx.attach(case.model(), case.folders, options=REFERENCE)
    inputs = token_inputs(2, 4)
    inputs["attention_mask"].fill_(1)
    for name in case.folders:
        with torch.no_grad(), lorafx.adapters(model, [name] * 2), EAGER():
            got = model(**inputs)["logits"]
        assert error(got, case.expected([name] * 2, inputs)) <= TOLERANCE


# A name that contains lm_head
class Named(nn.Module):
    """Modules whose names contain lm_head and that are no output embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 12)
        self.lm_head_norm_proj = nn.Linear(12, 12)
        self.blocks = nn.ModuleDict({"lm_head": nn.Linear(12, 12)})
        self.pre_lm_head = nn.Linear(12, 12)
        self.lm_head = nn.Linear(12, 20)
        self.out = nn.Linear(20, VOCAB)

    def get_output_embeddings(self) -> nn.Module:
        return self.out


LINEARS = ["lm_head_norm_proj", "blocks.lm_head", "pre_lm_head", "lm_head"]


@pytest.mark.parametrize("target", [None, "all-linear"])
def test_all_linear_leaves_out_what_the_model_says_is_its_head(target: Any) -> None:
    """By the model's word, not by the name."""

    class Silent(Named):
        get_output_embeddings = None  # type: ignore[assignment]

    for build, wanted in ((Named, LINEARS), (Silent, [*LINEARS, "out"])):
        _, sites = build_sites(build(), LoraConfig(target_modules=target))
        assert [site.path for site in sites] == wanted


V, D = 24, 20


class Scaled(nn.Module):
    """Looks rows of ±W up: arithmetic that no rule knows, of a class that nobody registered."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, D))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight.abs() * self.weight.sign())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = Scaled()
        self.inner = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.look_up(ids)))

    def look_up(self, ids: Tensor) -> Tensor:
        return self.words(ids)


class Broken(Tied):
    """Breaks behind the lookup and before the head, as around a loop over experts."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(V, D)
        self.head.weight = self.words.weight

    def look_up(self, ids: Tensor) -> Tensor:
        rows = self.words(ids).flatten(0, 1)
        torch._dynamo.graph_break()
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner(self.look_up(ids))
        torch._dynamo.graph_break()
        return self.head(x).unflatten(0, ids.shape)


class Copied(Broken):
    """The weight itself, copied in one graph and multiplied by in the next one."""

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.head.weight.clone()
        x = self.inner(self.look_up(ids))
        return x @ weight.T


def served(model: nn.Module, folder: Path) -> tuple[oracle.Oracle, lorafx.CompiledModel]:
    model = model.eval().requires_grad_(False)
    folders = {
        name: oracle.save_adapter(model, folder / name, rank=2, targets=["inner", "head"], seed=i)
        for i, name in enumerate("ab")
    }
    return oracle.Oracle.of(model, folders), lorafx.compile(model, folders, options=REFERENCE)


def test_an_embedding_of_any_class_is_no_use_of_the_head(tmp_path: Path) -> None:
    cases, cm = served(Tied(), tmp_path)
    inputs, names = {"ids": torch.randint(0, V, (3, 5))}, ["a", None, "b"]
    oracle.assert_close(cm(**inputs, adapter_names=names), cases.rows(names, inputs))


def test_rows_of_the_weight_behind_a_break_are_no_copy_of_it(tmp_path: Path) -> None:
    cases, cm = served(Broken(), tmp_path)
    for ids in (torch.arange(15).reshape(3, 5), torch.randint(0, V, (3, 5))):
        (want,) = cases.rows(["a"] * 3, {"ids": ids})
        oracle.assert_close(cm(ids, adapter_names=["a"] * 3), [want])
        assert oracle.difference(cases.rows([None] * 3, {"ids": ids}), [want]) > 1e-2
        torch._dynamo.reset()


def test_a_copy_of_the_weight_behind_a_break_is_one(tmp_path: Path) -> None:
    _, cm = served(Copied(), tmp_path)
    with pytest.raises(MatchError, match=r"head: .*the weight itself is returned"):
        cm(torch.arange(15).reshape(3, 5), adapter_names=["a"] * 3)
