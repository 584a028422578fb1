"""alias: one entry an instance; compiled wrappers are refused with their path."""

from __future__ import annotations

import pytest
import torch
from marking import attach_sites
from torch import nn

from lorafx.config import LoraConfig
from lorafx.errors import CaptureError
from lorafx.passes.select import Alias
from lorafx.prepare.marking import build_sites
from lorafx.program.preparation import Preparation

pytestmark = pytest.mark.quick


def shared_model() -> nn.Module:
    model = nn.Module()
    model.a = nn.Linear(4, 4)
    model.items = nn.ModuleList([model.a, nn.Linear(4, 4)])
    model.by_name = nn.ModuleDict({"x": model.items[1]})
    return model


def test_one_site_and_one_mark_for_an_instance_with_several_paths():
    model = shared_model()
    config = LoraConfig(target_modules=["a", "x", "items.0"])
    _, sites = build_sites(model, config)
    assert [site.paths for site in sites] == [("a", "items.0"), ("items.1", "by_name.x")]
    attachment = attach_sites(model, sites, config)
    assert len(model.a._forward_hooks) == len(model.items[1]._forward_hooks) == 1
    assert set(attachment.marks) == {"a", "items.1"}


def test_an_alias_beyond_the_listed_ones_is_still_a_target():
    leaf = nn.Linear(2, 2)
    model: nn.Module = leaf
    for _ in range(8):
        holder = nn.Module()
        holder.left = holder.right = model
        model = holder
    last = ".".join(["right"] * 8)
    (site,) = build_sites(model, LoraConfig(target_modules=[last]))[1]
    assert site.module is leaf
    assert last not in site.paths


def test_tied_weights_stay_two_sites():
    model = nn.Module()
    model.embed = nn.Embedding(10, 4)
    model.head = nn.Linear(4, 10, bias=False)
    model.head.weight = model.embed.weight
    graph, sites = build_sites(model, LoraConfig(target_modules=["embed", "head"]))
    assert [(site.path, site.eligible.kind) for site in sites] == [
        ("embed", "embedding"),
        ("head", "linear"),
    ]
    assert [o.path for o in graph.tied()[0]] == ["embed", "head"]


def test_cycles_end():
    model = shared_model()
    model.items.append(nn.Module())
    model.items[2].back = model
    assert [site.path for site in build_sites(model, LoraConfig())[1]] == ["a", "items.1"]


def test_compiled_wrappers_are_refused():
    model = shared_model()
    with pytest.raises(CaptureError, match=r"the model is wrapped by torch.compile.*_orig_mod"):
        Alias().run(Preparation(torch.compile(model), LoraConfig()))
    model.items[1] = torch.compile(model.items[1])
    with pytest.raises(CaptureError, match=r"the module at 'items\.1' is wrapped"):
        build_sites(model, LoraConfig())
