"""Target forms, against PEFT's own matching where it has one."""

from __future__ import annotations

import pytest

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


def test_forms_that_are_not_targets():
    with pytest.raises(ConfigError, match=r"target_modules='q\(' is not a regular expression"):
        targets.checked("q(", "target_modules")
    with pytest.raises(ConfigError, match=r"exclude_modules must be a list of module names.*got 3"):
        targets.checked(3, "exclude_modules")
    with pytest.raises(ConfigError, match=r"target_modules must be .*got \['a', None\]"):
        targets.checked(["a", None], "target_modules")
    assert targets.checked(None, "target_modules") is None
    assert set(targets.checked({"a", "b"}, "target_modules")) == {"a", "b"}
