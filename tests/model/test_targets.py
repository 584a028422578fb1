"""Target forms, against PEFT's own matching where it has one."""

from __future__ import annotations

import pytest
from torch import nn

from lorafx.errors import ConfigError
from lorafx.model import targets

pytestmark = pytest.mark.quick

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.self_attn.my_q_proj",
    "model.layers.0.mlp",
    "q_proj",
    "lm_head",
    "",
]
SPECS: list = [
    ["q_proj"],
    ["self_attn.q_proj"],
    ["0.self_attn.q_proj", "lm_head"],
    ["model.layers.0.mlp"],
    ["proj"],
    ["nothing"],
    r".*q_proj",
    r"model\.layers\.\d\.self_attn\.q_proj",
    "q_proj",
    "model",
    r".*(mlp|lm_head)",
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_same_as_peft(spec):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    config = peft.LoraConfig(target_modules=spec)
    for path in PATHS:
        assert targets.names(spec, [path]) == bool(check_target_module_exists(config, path)), path


def test_any_path_of_an_instance_counts():
    assert targets.names(["second"], ["first", "table.second"])
    assert targets.names(r"table\..*", ["first", "table.second"])
    assert not targets.names(["third"], ["first", "table.second"])


@pytest.mark.parametrize("spec", ["all-linear", "ALL-LINEAR", "All-Linear"])
def test_all_linear_in_any_case(spec):
    assert targets.is_all_linear(spec)


def test_all_linear_is_only_the_whole_word():
    assert not targets.is_all_linear("all-linear2")
    assert not targets.is_all_linear(["all-linear"])
    assert not targets.is_all_linear(None)


def test_forms_that_are_not_targets():
    with pytest.raises(ConfigError, match=r"target_modules='q\(' is not a regular expression"):
        targets.checked("q(", "target_modules")
    with pytest.raises(ConfigError, match=r"exclude_modules must be a list of module names.*got 3"):
        targets.checked(3, "exclude_modules")
    with pytest.raises(ConfigError, match=r"target_modules must be .*got \['a', None\]"):
        targets.checked(["a", None], "target_modules")
    assert targets.checked(None, "target_modules") is None
    assert set(targets.checked({"a", "b"}, "target_modules")) == {"a", "b"}


def test_nearest_targets_compares_last_names_or_whole_paths():
    paths = [f"layers.{i}.{name}" for i in range(30) for name in ("q_proj", "up_proj")]
    assert targets.nearest_targets("q_prj", paths) == "; nearest: q_proj, up_proj"
    assert "layers.7.q_proj" in targets.nearest_targets("layers.7.qproj", paths)
    assert targets.nearest_targets("zzz", paths) == ""


class Silent(nn.Module):
    def get_output_embeddings(self):
        raise NotImplementedError


def test_output_embedding():
    assert targets.output_embedding(nn.Linear(2, 2)) is None
    assert targets.output_embedding(Silent()) is None
    model = nn.Module()
    model.head = nn.Linear(2, 2)
    model.get_output_embeddings = lambda: model.head
    assert targets.output_embedding(model) is model.head
