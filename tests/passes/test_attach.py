"""attach: nothing but hooks changes, siblings share banks, compiled models are refused."""

from __future__ import annotations

import pytest
import torch
from marking import ALL, attach, llama
from torch import nn

from lorafx.errors import CaptureError, ConfigError

pytestmark = pytest.mark.quick


def test_nothing_but_hooks_changes_and_detach_takes_them_away():
    model = llama()
    names = [(n, type(m), id(m)) for n, m in model.named_modules()]
    state = {k: (v.data_ptr(), v.dtype, v.shape) for k, v in model.state_dict().items()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    attachment = attach(model, ALL)
    assert [(n, type(m), id(m)) for n, m in model.named_modules()] == names
    assert {k: (v.data_ptr(), v.dtype, v.shape) for k, v in model.state_dict().items()} == state
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    attachment.detach()
    attachment.detach()
    assert not any(
        hook for m in model.modules() for hook in (m._forward_hooks, m._forward_hooks_with_kwargs)
    )


def test_detach_leaves_other_hooks():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(lambda *_: None)
    attachment = attach(model)
    attachment.detach()
    assert len(model[0]._forward_hooks) == 1


def test_siblings_share_a_bank():
    attachment = attach(llama(), ALL)
    found = [([s.path.rpartition(".")[2] for s in g.sites], g.offsets) for g in attachment.groups]
    layer = [
        (["q_proj", "k_proj", "v_proj", "o_proj"], (0, 32, 48, 64)),
        (["gate_proj", "up_proj"], (0, 48)),
        (["down_proj"], (0,)),
    ]
    assert found == [(["embed_tokens"], (0,)), *layer, *layer, (["lm_head"], (0,))]
    bank = attachment.groups[1].bank
    assert bank.A.shape == (3, 4, 4 * 32)
    assert bank.B.shape == (3, 4, 96)
    assert attachment.groups[0].bank.A.shape == (3, 50, 4)
    marks = [attachment.marks[s.path] for s in attachment.groups[1].sites]
    assert [m.siblings for m in marks] == [(0,), (1,), (2,), (3,)]
    assert all(m.bank is bank for m in marks)


def test_attaching_twice():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    attachment = attach(model, ["1"])
    with pytest.raises(CaptureError, match="1 already carries a LoRA mark; detach"):
        attach(model, ["0"])
    assert not model[0]._forward_hooks
    attachment.detach()
    attach(model, ["0"])


def compiled_call(model):
    model[1].compile(backend="eager")


def compiled_forward(model):
    model[1].forward = torch.compile(model[1].forward, backend="eager")


def compiled_whole(model):
    model.compile(backend="eager")


@pytest.mark.parametrize(
    ("compile_it", "message"),
    [
        (compiled_whole, r"the model \(Sequential\) was compiled by module\.compile\(\)"),
        (compiled_call, r"1 \(Sequential\) was compiled by module\.compile\(\)"),
        (compiled_forward, r"the forward of 1 \(Sequential\) was compiled by torch\.compile"),
    ],
)
def test_a_model_that_is_compiled_already(compile_it, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    compile_it(model)
    with pytest.raises(CaptureError, match=message):
        attach(model)
    assert not any(m._forward_hooks for m in model.modules())


def test_sites_on_two_devices():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ConfigError, match="the sites lie on cpu, meta"):
        attach(model)
    assert not model[0]._forward_hooks
