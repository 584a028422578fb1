"""PEFT configurations: benign values pass, everything else is refused by name."""

from __future__ import annotations

import dataclasses

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorafx.adapter_store import peft_config
from lorafx.adapter_store.methods.table import METHODS
from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.errors import CheckpointError, UnsupportedAdapterError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.quick]

PATHS = [
    "model.embed_tokens",
    "lm_head",
    *(
        f"model.layers.{i}.{name}"
        for i in (0, 1, 11)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.3.up_proj")
    ),
    "encoder.h.1.attn.q_proj",
    "q_proj",
]


def test_defaults_pass_as_object_dict_and_folder(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    config.save_pretrained(str(tmp_path))
    read = [PeftConfig.read(source) for source in (config, config.to_dict(), str(tmp_path))]
    assert read[0] == read[1] == read[2]
    assert (read[0].r, read[0].lora_alpha, read[0].max_rank) == (3, 5, 3)
    assert read[0].target_modules == ("q_proj", "v_proj")


def test_every_field_of_the_installed_peft_is_known():
    """A field that a new PEFT adds must be sorted into one of the three tables."""
    known = {*peft_config._READ, *peft_config._NO_ARITHMETIC, *peft_config._REFUSED}
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} <= known


REFUSED = {
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "layer_replication": [[0, 1]],
    "megatron_config": {"a": 1},
    "arrow_config": {"top_k": 2},
    "kasa_config": {},
    "init_lora_weights": "pissa_niter_16",
    "peft_type": "LOHA",
    "a_field_of_tomorrow": 3,
}


@pytest.mark.parametrize("field", REFUSED)
def test_refused_by_name(field):
    with pytest.raises(UnsupportedAdapterError) as caught:
        PeftConfig.read({"peft_type": "LORA", "r": 4, field: REFUSED[field]})
    line = str(caught.value).splitlines()[1]
    assert line.startswith(f"  - {field} = ")
    assert len(line.split(": ", 1)[1]) > 20  # the way out


@pytest.mark.parametrize(
    "also",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"monteclora_config": {"num_samples": 2}},
    ],
    ids=lambda also: next(iter(also)),
)
def test_what_alora_is_not_trained_with(also):
    config = {"r": 4, "alora_invocation_tokens": [1, 2]}
    assert PeftConfig.read(config).invocation == (1, 2)
    with pytest.raises(UnsupportedAdapterError, match=f"{next(iter(also))} = .* with alora_inv"):
        PeftConfig.read({**config, **also})


@pytest.mark.parametrize(
    "fields",
    [
        *({"tomorrow": off} for off in (None, False, [], {}, "")),
        {"modules_to_save": []},
        {"alora_invocation_tokens": []},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"monteclora_config": {"num_samples": 2}},  # which training alone samples by
        {"corda_config": {"corda_method": "kpm"}},  # stays set after an exact export
        {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "qalora_group_size": 32},
        {"enable_lora": None, "merge_weights": False, "rank_pattern": None},  # PEFT of 2023
        {"peft_type": None, "auto_mapping": {"base_model_class": "X", "unsloth_fixed": True}},
    ],
)
def test_benign_values_pass(fields):
    assert PeftConfig.read({"r": 4, **fields}).r == 4


def test_trained_tokens_alone_are_those_of_lora():
    own = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 5], "init_weights": True}
    named = PeftConfig.read({**own, "target_modules": ["wte", "head"]})
    assert named.trainable_token_indices == {"wte": (3, 5), "head": (3, 5)}
    assert PeftConfig.read(own).trainable_token_indices == {"": (3, 5)}
    for wrong in ([3, 3], None, [-1], "3"):
        with pytest.raises(CheckpointError, match="trainable_token_indices"):
            PeftConfig.read({**own, "token_indices": wrong})


READ = {"TRAINABLE_TOKENS", *(method.peft_type for method in METHODS)}


@pytest.mark.parametrize("kind", sorted({kind.value for kind in peft.PeftType} - READ))
def test_every_other_method_of_the_installed_peft_has_its_own_reason(kind):
    with pytest.raises(UnsupportedAdapterError) as caught:
        PeftConfig.read({"peft_type": kind})
    assert "files of" not in str(caught.value)  # the reason of those that nobody knows


KEYS = [
    "q_proj",
    r"layers\.1\..*",
    r".*\.up_proj",
    "^model.layers.0.self_attn.q_proj",
    "proj",
    r"\d+",
]


@given(st.permutations(KEYS), st.integers(0, 6), st.sampled_from(PATHS), st.booleans())
def test_patterns_as_peft(keys, count, path, rslora):
    """The first matching key in the file's order decides rank and alpha, as PEFT has it."""
    pattern = {key: i + 2 for i, key in enumerate(keys[:count])}
    config = PeftConfig.read(
        {
            "r": 1,
            "lora_alpha": 50,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "use_rslora": rslora,
        }
    )
    said = get_pattern_key(pattern.keys(), path)
    rank, alpha = pattern.get(said, 1), pattern.get(said, 50)
    assert config.rank(path) == rank
    assert config.scale(path, rank) == pytest.approx(alpha / (rank**0.5 if rslora else rank))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["model.layers.1.mlp.up_proj", "experts.3.up_proj"]},
        {"target_modules": r".*\.(0|11)\..*_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["mlp.up_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 11], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["x", "h"]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
    ],
)
def test_matches_as_peft(fields):
    theirs = peft.LoraConfig(**fields)
    ours = PeftConfig.read(theirs)
    expected = {p for p in PATHS if check_target_module_exists(theirs, p)}
    assert {p for p in PATHS if ours.matches(p)} == expected != set()
