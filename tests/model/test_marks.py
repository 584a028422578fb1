"""Marks in eager mode: dense merge where the delta has a place, a refusal where it has none."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from marking import ALL, IDS, attach, llama
from torch import nn

from lorafx.errors import MatchError, ProvenanceError
from lorafx.model.marks import Attachment, SiteMark, detach

pytestmark = pytest.mark.quick

SLOT = 1
SCALE = 0.5


def write_adapter(attachment: Attachment, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random factors of rank 3 at every site, in slot SLOT; ΔW by path, in the weight's layout.

    The rank beyond 3 is filled with NaN, which nothing may read.
    """
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for group in attachment.groups:
        bank, rank = group.bank, 3
        bank.A[SLOT] = bank.B[SLOT] = torch.nan
        for index, (site, offset) in enumerate(zip(group.sites, group.offsets, strict=True)):
            a = torch.randn(rank, site.in_features, generator=generator) * 0.3
            b = torch.randn(rank, site.out_features, generator=generator) * 0.3
            if site.eligible.kind == "embedding":
                bank.A[SLOT, :, :rank] = a.T
            else:
                bank.A[SLOT, :rank].unflatten(1, (bank.ranks.shape[1], -1))[:, index] = a
            bank.B[SLOT, :rank, offset : offset + site.out_features] = b
            bank.ranks[SLOT, index] = rank
            bank.scales[SLOT, index] = SCALE
            as_stored = site.eligible.kind == "embedding" or site.eligible.transposed
            deltas[site.path] = SCALE * (a.T @ b if as_stored else b.T @ a)
    return deltas


def merged(model: nn.Module, deltas: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of `model` (before it was marked) with W + ΔW; tied weights part first."""
    model = copy.deepcopy(model)
    for path, delta in deltas.items():
        module = model.get_submodule(path)
        module.weight = nn.Parameter((module.weight + delta).detach())
    return model


def check(model, target, inputs, out=lambda y: y, **config) -> Attachment:
    """Marked eager equals dense merge for one adapter and the base for none; then both again."""
    plain = copy.deepcopy(model)
    attachment = attach(model, target, **config)
    dense = merged(plain, write_adapter(attachment))
    with torch.no_grad():
        base, wanted = out(plain(**inputs)), out(dense(**inputs))
        assert (base - wanted).abs().max() > 1e-2  # the adapter does something
        assert torch.equal(out(model(**inputs)), base)
        attachment.runtime.set_rows([SLOT, SLOT])
        torch.testing.assert_close(out(model(**inputs)), wanted, rtol=1e-5, atol=1e-5)
        attachment.runtime.set_rows([-1, -1])
        assert torch.equal(out(model(**inputs)), base)
        attachment.runtime.set_rows([SLOT, SLOT])
    return attachment


def logits(output):
    return output.logits


# Numerics


@pytest.mark.parametrize("tied", [False, True])
def test_llama_equals_dense_merge(tied):
    attachment = check(llama(tie_word_embeddings=tied), ALL, IDS, logits)
    assert len(attachment.marks) == 16


# What eager mode cannot do, it says


def test_a_mixed_batch_is_refused_in_eager_mode():
    model = llama()
    attachment = attach(model, ["q_proj"])
    write_adapter(attachment)
    attachment.runtime.set_rows([SLOT, -1])
    with (
        torch.no_grad(),
        pytest.raises(
            ProvenanceError,
            match=r"layers\.0\.self_attn\.q_proj: the batch mixes.*compile",
        ),
    ):
        model(**IDS)


class Pair(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.sum()


class Pooled(nn.Linear):
    """The sizes fit, the rows do not."""

    def forward(self, x):
        return super().forward(x).mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Pair(4, 4), r"0 \(Pair\): its class overrides forward, which does not compute x Wᵀ"),
        (Pooled(4, 4), r"0 \(Pooled\): .*input \(2, 4\) .*output \(1, 4\)"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_forwards_that_leave_no_place_for_the_delta(module, message):
    model = nn.Sequential(module)
    attachment = attach(model)
    write_adapter(attachment)
    model(torch.randn(2, 4))  # the base model is served as before
    attachment.runtime.set_rows([SLOT, SLOT])
    with pytest.raises(MatchError, match=message):
        model(torch.randn(2, 4))


# Copies


def _pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    return pickle.load(buffer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copy_is_marked_and_independent(duplicate):
    model = llama()
    attachment = check(model, ALL, IDS, logits)
    with torch.no_grad():
        adapted = model(**IDS).logits
        other = duplicate(model)
        marks = [h for m in other.modules() for h in m._forward_hooks.values()]
        assert len(marks) == len(attachment.marks)
        assert all(isinstance(mark, SiteMark) for mark in marks)
        (runtime,) = {id(mark.runtime): mark.runtime for mark in marks}.values()
        assert len({id(mark.bank) for mark in marks}) == len(attachment.groups)
        attachment.runtime.clear()  # the original's batch is not the copy's
        assert torch.equal(other(**IDS).logits, adapted)
        runtime.clear()
        assert torch.equal(other(**IDS).logits, model(**IDS).logits)
        assert detach(other) == len(marks)
        assert detach(other) == 0
    assert len(model.lm_head._forward_hooks) == 1
