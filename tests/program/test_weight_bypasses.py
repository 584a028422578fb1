"""Weights used without their module, through one another's modules, or in ways no rule knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bypasses import BATCHES, PAST, REFUSED, case_of, check, compile_prepared
from dense_merge import check_mixed, error
from slowly import each
from torch import Tensor, nn

from lorafx.errors import MatchError

K, N = 6, 9
NAMES = ["a", None, "b", "a"]


def features(rows: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, length, K)}


class Bypass(nn.Module):
    """A linear, then one that is used by a function of it and of its input."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.w, self.use = nn.Linear(K, K), nn.Linear(K, N), use

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.use(self.w, torch.tanh(self.first(x)))}


def by_addmm(w: nn.Linear, h: Tensor) -> Tensor:
    return torch.addmm(w.bias, h.flatten(0, 1), w.weight.t()).view(*h.shape[:2], N)


def by_thirds(w: nn.Linear, h: Tensor) -> Tensor:
    """A block of rows for each third of the tokens' copies."""
    return torch.einsum("btk,gnk->btgn", h, w.weight.unflatten(0, (3, -1))).flatten(2)


BYPASSES: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "sliced in steps": lambda w, h: F.linear(h[..., :3], w.weight[1:-1:3, 2:5]),
    "summed over out": lambda w, h: torch.tanh(h @ w.weight.T) @ w.weight,
    "thirds": by_thirds,
    "functional": lambda w, h: F.linear(h, w.weight, w.bias),
    "from the left": lambda w, h: (w.weight @ h.mT).mT + w.bias,
    "einsum": lambda w, h: torch.einsum("btk,nk->btn", h, w.weight),
    "addmm": by_addmm,
    "scaled": lambda w, h: h @ (0.5 * w.weight * 3).T,
    "negated and divided": lambda w, h: F.linear(h, -(w.weight / 2), w.bias),
    "called and bypassed": lambda w, h: w(h) + F.linear(h.flip(-1), w.weight),
    "called twice": lambda w, h: w(h) + torch.tanh(w(h * 0.5)),
}


@pytest.mark.quick
@pytest.mark.parametrize("use", BYPASSES)
def test_weights_used_without_their_module(small, use):
    """They are linears in disguise: each use gets its delta, once."""
    case = small(partial(Bypass, BYPASSES[use]), ["w"], ["w", "first"])
    cm = case.compile()
    check_mixed(cm, case, NAMES, features(4, 3))


UNKNOWN: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "scaled by rows": lambda w, h: h @ (w.weight * w.bias[:, None]).T,
    "normed": lambda w, h: w(h) / w.weight.norm(),
    # (W + ΔW)ᵀ (W + ΔW) is not the sum of two deltas.
    "one after another": lambda w, h: h @ (w.weight.T @ w.weight),
}


@pytest.mark.quick
@pytest.mark.parametrize("use", UNKNOWN)
def test_an_unknown_use_is_refused_by_name_where_an_adapter_touches_it(small, use):
    case = small(partial(Bypass, UNKNOWN[use]), ["w"], ["first"])
    cm = case.compile()
    inputs = features(2, 3)
    for names in (["a", "a"], ["a", None], ["b", "a"]):
        with pytest.raises(MatchError, match="LoRA cannot be applied at w: its weight is used in"):
            cm(**inputs, adapter_names=names)
    check_mixed(cm, case, ["b", None], inputs)
    assert torch.equal(cm(**inputs)["logits"], case.base(**inputs)["logits"])
    assert "refused (always): w: its weight is used" in str(cm.explain())


class Indexed(nn.Module):
    """Rows of an embedding's weight, also by numbers that count from its end, scaled or not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, K)
        self.register_buffer("gain", torch.tensor(0.7))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        weight = self.embed.weight
        chosen = weight.index_select(0, ids.flatten()).view(*ids.shape, K)
        return {"logits": weight[ids - 4] + torch.tanh((weight * self.gain)[ids] * chosen)}


@pytest.mark.quick
def test_rows_of_an_embedding_by_indexing(small):
    case = small(Indexed, ["embed"])
    check_mixed(case.compile(), case, NAMES, tokens(4, 3))


class FastPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(K, 2, 10, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x)}


def test_transformer_encoder_layers_take_no_fast_path_past_lora(small):
    case = small(FastPath, ["layer.linear1"])
    cm = case.compile()
    inputs = features(4, 3)
    before = torch.backends.mha.get_fastpath_enabled()
    check_mixed(cm, case, NAMES, inputs)
    assert torch.backends.mha.get_fastpath_enabled() is before
    # torch leaves its fast path wherever a forward hook of any kind hangs, so bit-equality is with
    # the base model off that path; on it, the base's own numbers differ in the last place.
    with torch.no_grad():
        base = cm(**inputs)["logits"]
        assert error(base, case.base(**inputs)["logits"]) <= 1e-5
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert torch.equal(base, case.base(**inputs)["logits"])
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


class Root(nn.Embedding):
    """Scales what it returns, by a factor that nothing declares."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * math.sqrt(self.embedding_dim)


class ScaledEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = Root(11, K)
        self.head = nn.Linear(K, 11, bias=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embed(ids))}


class Tied(ScaledEmbedding):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 11, (rows, length))}


@pytest.mark.parametrize("end", ["embed", "head"])
def test_a_tied_weight_of_which_only_one_end_is_selected(small, end):
    case = small(Tied, [end])
    cm = case.compile()
    assert [site.path for site in cm.sites] == [end]
    check_mixed(cm, case, NAMES, tokens(4, 3))


class OneWeightTwice(nn.Module):
    """Two linears over one weight; its forward calls itself something other than `self`."""

    def __init__(this) -> None:
        super().__init__()
        this.w = nn.Linear(K, K)
        this.v = nn.Linear(K, K)
        this.v.weight = this.w.weight

    def forward(this, x: Tensor) -> dict[str, Tensor]:
        return {"logits": this.w(x) + torch.tanh(this.v(x))}


def test_two_modules_over_one_weight_of_which_one_is_selected(small):
    """Told apart by the module whose forward the use is in."""
    case = small(OneWeightTwice, ["w"])
    check_mixed(case.compile(), case, NAMES, features(4, 3))


@pytest.mark.parametrize("how", each(2, PAST))
def test_uses_by_copies_hooks_and_numpy_carry_the_delta(small, how):
    case = case_of(PAST[how], small)
    check(compile_prepared(case), case, BATCHES[0])


@pytest.mark.parametrize("how", REFUSED)
def test_uses_that_no_graph_sees_are_refused(small, how):
    cm = compile_prepared(case_of(REFUSED[how], small))
    for names in BATCHES[:2]:
        with pytest.raises(MatchError, match="LoRA cannot be applied"):
            cm(x=torch.randn(len(names), 3, 16), adapter_names=names)
