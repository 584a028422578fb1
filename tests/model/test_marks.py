"""Marks in eager mode: what they refuse, their copies, and what they are made of."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from dense_merge import random_base
from marking import ALL, IDS, attach, llama
from own_weights import own_case
from torch import nn

from lorafx import LoraConfig
from lorafx.errors import MatchError, ProvenanceError
from lorafx.model.attachment import Attachment, detach
from lorafx.model.marks import SiteMark
from lorafx.model.targets import AdapterNames
from lorafx.runtime.marking import config_covering, request_of
from lorafx.torch_internals.compat import no_mha_fast_path

pytestmark = pytest.mark.quick

SLOT = 1


def write_adapter(attachment: Attachment) -> None:
    """Random factors at every site, in slot SLOT."""
    torch.manual_seed(0)
    for group in attachment.groups:
        for factor in (group.bank.A, group.bank.B):
            factor[SLOT] = torch.randn_like(factor[SLOT]) * 0.3
        group.bank.ranks[SLOT] = 4
        group.bank.scales[SLOT] = 0.5


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


def _pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    return pickle.load(buffer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copy_is_marked_and_independent(duplicate):
    model = llama()
    attachment = attach(model, ALL)
    write_adapter(attachment)
    attachment.runtime.set_rows([SLOT, SLOT])
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


def test_the_fast_path_of_attention_stays_off_for_whoever_needs_it_last():
    """It is one switch of the process: two models on two threads."""
    assert torch.backends.mha.get_fastpath_enabled()
    with no_mha_fast_path():
        inner = no_mha_fast_path()
        inner.__enter__()
    assert not torch.backends.mha.get_fastpath_enabled()
    inner.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled()


ADAPTERS = {
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [3, 5, 9]},
    "dora": {"target_modules": ["k_proj"], "use_dora": True},
    "fewer": {"target_modules": ["v_proj", "o_proj"], "trainable_token_indices": [7]},
}


@pytest.mark.quick
@pytest.mark.parametrize("targets", [None, ["q_proj", "up_proj"]])
def test_covering(tmp_path, targets):
    base = random_base("llama")
    case = own_case(base, tmp_path, ADAPTERS)
    asked = LoraConfig(target_modules=targets, max_adapters=3, trainable_tokens=2)
    later = config_covering(asked, case.folders, base)
    at_once = request_of(asked, case.folders, base).config
    assert later == at_once
    assert isinstance(later.target_modules, AdapterNames) == (targets is None)
    assert later.use_dora
    assert max(later.trainable_tokens.values()) == 3
    assert later.modules_to_save
