"""A target and a draft that share embedding and head, each served with its own adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_merge import REFERENCE, TOLERANCE, Case, error, random_base, save_adapter
from slowly import few
from tiny_models import FAMILIES, VOCAB, Family, token_inputs
from torch import Tensor, nn

import lorafx
from lorafx.errors import CaptureError, MatchError

NAMES = ["a", None, "b"]


class Draft(nn.Module):
    """Eagle's shape: the target's embedding and head around a block of its own."""

    def __init__(self, embed: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = embed, head
        size = embed.embedding_dim
        torch.manual_seed(5)
        self.fc = nn.Linear(size, size)
        self.proj = nn.Linear(size, size, bias=False)
        self.eval().requires_grad_(False)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed_tokens(input_ids)
        return {"logits": self.lm_head(x + self.proj(torch.relu(self.fc(x))))}


def shared_parameters(embed: nn.Embedding, head: nn.Linear) -> tuple[nn.Module, nn.Module]:
    """Other modules over the same parameters."""
    ids = nn.Embedding(*embed.weight.shape)
    logits = nn.Linear(head.in_features, head.out_features, bias=False)
    ids.weight, logits.weight = embed.weight, head.weight
    return ids, logits


def ends(target: nn.Module) -> tuple[nn.Module, nn.Module]:
    holder = target if isinstance(target, Draft) else target.model
    return holder.embed_tokens, target.lm_head


class Pair:
    """Target and draft over one embedding and one head, with their cases."""

    def __init__(self, target: Case, draft: Case, *, parameters: bool = False) -> None:
        self.target_case, self.draft_case = target, draft
        self.target = target.model()
        embed, head = ends(self.target)
        self.draft = Draft(*(shared_parameters(embed, head) if parameters else (embed, head)))

    def compile(self, *, dynamic: bool = False) -> tuple[Any, Any]:
        settings = {"options": REFERENCE, "dynamic": dynamic}
        return (
            lorafx.compile(self.target, self.target_case.folders, **settings),
            lorafx.compile(self.draft, self.draft_case.folders, **settings),
        )


def cases_of(base: nn.Module, layers: list[str], folder: Path) -> SimpleNamespace:
    """Both models' adapters a touch embedding and head, each with factors of its own; of the b's
    only the draft's does."""
    draft = copy.deepcopy(Draft(*ends(base)))
    both = ["lm_head", "embed_tokens"]

    def adapters(model: nn.Module, kind: str, targets: dict[str, list[str]]) -> Case:
        folders = {}
        for seed, (name, paths) in enumerate(targets.items()):
            at, seed = folder / kind / name, seed + len(kind)
            folders[name] = save_adapter(model, at, rank=seed - 2, targets=paths, seed=seed)
        return Case(model, folders)

    return SimpleNamespace(
        target=adapters(base, "target", {"a": [*both, layers[0]], "b": layers[1:]}),
        draft=adapters(draft, "draft", {"a": [*both, "fc"], "b": ["lm_head"]}),
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    base = random_base("llama", tie_word_embeddings=False)
    return cases_of(base, ["q_proj", "down_proj"], tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small target, for what does not depend on the model."""

    def build() -> nn.Module:
        return Draft(nn.Embedding(VOCAB, 12), nn.Linear(12, VOCAB, bias=False))

    base = random_base(Family(build, ()))
    return cases_of(base, ["proj", "fc"], tmp_path_factory.mktemp("plain"))


@pytest.fixture
def pair(cases: SimpleNamespace) -> Pair:
    return Pair(cases.target, cases.draft, parameters=True)


def check(cm: Any, case: Case, names: list[str | None] = NAMES, length: int = 4) -> None:
    torch.manual_seed(length)
    inputs = {"input_ids": token_inputs(len(names), length)["input_ids"]}
    got = cm(**inputs, adapter_names=names)["logits"]
    assert error(got, case.expected(names, inputs)) <= TOLERANCE


@pytest.mark.parametrize("parameters", [False, True], ids=["modules", "parameters"])
def test_a_weight_of_both_lies_in_one_pack(llama: SimpleNamespace, parameters: bool) -> None:
    """Weights are packed at the second call, or where another model is compiled."""
    case = llama.target
    models = case.model(), case.model()
    own, other = (model.model.layers[0] for model in models)
    names = ["q_proj", "k_proj", "v_proj"]
    for name in names:
        projection = getattr(own.self_attn, name)
        if parameters:
            getattr(other.self_attn, name).weight = projection.weight
        else:
            setattr(other.self_attn, name, projection)
    targets = [*names, "down_proj", "lm_head", "embed_tokens"]
    config = lorafx.LoraConfig(targets, max_rank=8)
    options = {**REFERENCE, "start": "eager", "cache": None}
    first = lorafx.compile(models[0], config, adapters=case.folders, options=options)
    watch = first._session.program.pack_watch
    check(first, case)
    assert not watch.intact
    second = lorafx.compile(models[1], config, adapters=case.folders, options=options)
    assert watch.intact
    for length in (4, 5):
        check(first, case, length=length)
        check(second, case, length=length)
    assert watch.intact
    assert second._session.program.pack_watch.intact


@pytest.mark.parametrize("family", ["cases", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("parameters", few([False, True], False), ids=["modules", "parameters"])
def test_calls_of_both_in_turns(
    request: pytest.FixtureRequest, family: str, parameters: bool
) -> None:
    cases = request.getfixturevalue(family)
    pair = Pair(cases.target, cases.draft, parameters=parameters)
    target, draft = pair.compile(dynamic=True)
    for length in (4, 5):
        check(target, pair.target_case, length=length)
        check(draft, pair.draft_case, length=length)
        check(draft, pair.draft_case, [None] * 3, length)
        check(target, pair.target_case, ["a"] * 3, length)
        check(target, pair.target_case, [None] * 3, length)
    graphs = target.recompiles, draft.recompiles
    check(draft, pair.draft_case, ["b", "b", "a"])
    check(target, pair.target_case, ["b", "a", None])
    assert (target.recompiles, draft.recompiles) == graphs


def test_the_draft_comes_after_the_target_has_been_called(pair: Pair) -> None:
    settings = {"options": REFERENCE}
    target = lorafx.compile(pair.target, pair.target_case.folders, **settings)
    check(target, pair.target_case)
    draft = lorafx.compile(pair.draft, pair.draft_case.folders, **settings)
    check(draft, pair.draft_case)
    check(target, pair.target_case, ["b", "a", None])
    target.set_adapter("a")
    check(draft, pair.draft_case)
    check(draft, pair.draft_case, [None] * 3)


@pytest.mark.parametrize("first", few(["target", "draft"], "target"))
def test_one_is_detached(pair: Pair, first: str) -> None:
    served = dict(zip(("target", "draft"), pair.compile(), strict=True))
    cases = {"target": pair.target_case, "draft": pair.draft_case}
    for name, cm in served.items():
        check(cm, cases[name])
    served.pop(first).detach()
    for name, cm in served.items():
        check(cm, cases[name])
        check(cm, cases[name], ["b", None, "a"], 5)
        cm.detach()
    marks = [m for m in (*pair.target.modules(), *pair.draft.modules()) if m._forward_hooks]
    assert not marks
    again = lorafx.compile(pair.target, pair.target_case.folders, options=REFERENCE)
    check(again, pair.target_case)


def test_merging(pair: Pair) -> None:
    """Into shared weights it would change the other model's base; into others it may be."""
    target, draft = pair.compile()
    for cm, path in ((target, "lm_head"), (draft, "lm_head")):
        with pytest.raises(MatchError, match=f"{path}.weight of another"):
            cm.merge("a")
        assert cm.merged is None
    target.merge("b")
    check(target, pair.target_case, ["b"] * 3)
    check(draft, pair.draft_case)
    target.unmerge()
    check(target, pair.target_case)
    draft.detach()
    target.merge("a")
    with pytest.raises(CaptureError, match="'a' is merged; call unmerge"):
        lorafx.compile(pair.draft, pair.draft_case.folders, options=REFERENCE)
    target.unmerge()
    draft = lorafx.compile(pair.draft, pair.draft_case.folders, options=REFERENCE)
    check(draft, pair.draft_case)
    check(target, pair.target_case)


def test_new_base_weights_are_those_of_both(pair: Pair) -> None:
    target, draft = pair.compile()
    check(target, pair.target_case)
    check(draft, pair.draft_case)
    new = {name: 1.25 * value for name, value in target._orig_mod.state_dict().items()}
    target.load_weights(new)
    bases = pair.target_case.model(), pair.draft_case.model()
    with torch.no_grad():
        for parameter in bases[0].parameters():
            parameter.mul_(1.25)
        bases[1].embed_tokens.weight.mul_(1.25)
        bases[1].lm_head.weight.mul_(1.25)
    check(target, Case(bases[0], pair.target_case.folders))
    check(draft, Case(bases[1], pair.draft_case.folders))


@pytest.mark.slow
def test_assisted_generation(llama: SimpleNamespace, tmp_path: Path) -> None:
    """Greedy, so the result is the target's own, whatever the draft proposes."""
    target_model = llama.target.model()
    draft_model = FAMILIES["llama"].build(tie_word_embeddings=False).eval()
    draft_model.requires_grad_(False)
    draft_model.model.embed_tokens = target_model.model.embed_tokens
    draft_model.lm_head = target_model.lm_head
    alone = copy.deepcopy(draft_model)
    folder = save_adapter(alone, tmp_path / "d", rank=2, targets=["lm_head", "q_proj"])
    draft_case = Case(alone, {"d": folder})
    target = lorafx.compile(target_model, llama.target.folders, options=REFERENCE)
    draft = lorafx.compile(draft_model, draft_case.folders, options=REFERENCE)
    ids = torch.randint(3, VOCAB, (1, 5))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    draft.set_adapter("d")
    got = target.generate(ids, adapter_names=["a"], assistant_model=draft, **settings)
    assert torch.equal(got, llama.target.alone("a").generate(ids, **settings))
    assert draft.recompiles
    got = draft.generate(ids, **settings)
    assert torch.equal(got, draft_case.alone("d").generate(ids, **settings))
    check(target, llama.target)


def test_what_is_refused(cases: SimpleNamespace) -> None:
    pair = Pair(cases.target, cases.draft)
    target = lorafx.compile(pair.target, cases.target.folders, options=REFERENCE)
    with pytest.raises(CaptureError, match=r"already (compiled this|carries a LoRA mark)"):
        lorafx.compile(pair.target, options=REFERENCE)
    with pytest.raises(CaptureError, match="already carries a LoRA mark"):
        lorafx.compile(copy.deepcopy(pair.draft), options=REFERENCE)
    lorafx.detach(pair.draft)
    check(target, cases.target)
