"""Attention by the generated kernel in whole models: prompts, padding, windows, encoders, and steps
with a cache whose heads queries share.

Inductor's code calls the kernel where heads are shared (and, slowly, in bfloat16 and in a static
cache). The other models differ in what the kernel is given, and run node by node.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import build_case, check_bfloat16, check_mixed
from slowly import few
from tiny_models import right_padded, token_inputs
from toolchain import needs_compiler

import lorafx
from lorafx.torch_internals.cpu import has_matrix_tiles

pytestmark = [pytest.mark.any_sizes, needs_compiler]

BY_INDUCTOR = {"lowering": "inductor"}
NAMES = ["a1", None, "a3", "a0"]
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "min_new_tokens": 4}


def replaced(cm: Any) -> list[int]:
    """In each graph with adapters, the attentions that the pass has replaced."""
    records = [record for record in cm._session.records if record.lora]
    return [p.edits for record in records for p in record.passes if p.name == "attend_dense"]


def check_prompts(family: str, changes: dict[str, Any], prompts: Any, folder: Path) -> None:
    case = build_case(family, folder, **changes)
    cm = case.compile(BY_INDUCTOR)
    torch.manual_seed(0)
    check_mixed(cm, case, NAMES, prompts(4, 7))
    (edits,) = replaced(cm)
    assert edits == case.base.config.num_hidden_layers
    check_mixed(cm, case, ["a2", "a2", None, "a4"], prompts(4, 9))
    assert len(replaced(cm)) == 1


@pytest.mark.slow
def test_prompts_whose_heads_are_shared(tmp_path: Path) -> None:
    check_prompts("llama", {"num_hidden_layers": 1}, token_inputs, tmp_path)


@pytest.mark.usefixtures("node_by_node")
@pytest.mark.parametrize(
    ("family", "changes", "prompts"),
    few(
        [
            ("llama", {"num_hidden_layers": 1, "num_key_value_heads": 4}, right_padded),
            (
                "gemma3",
                {"sliding_window": 3, "num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
                token_inputs,
            ),
            ("bert", {}, right_padded),
        ],
        "gemma3",
    ),
    ids=["own heads", "window", "encoder"],
)
def test_other_prompts(family: str, changes: dict[str, Any], prompts: Any, tmp_path: Path) -> None:
    check_prompts(family, changes, prompts, tmp_path)


@pytest.mark.parametrize(
    ("cache", "code"),
    few([(None, "node_by_node"), ("static", "node_by_node"), ("static", None)], None),
    ids=["dynamic", "static", "static by Inductor"],
)
def test_decode_steps(cache: str | None, code: str | None, tmp_path: Path, request: Any) -> None:
    """Tokens of a mixed batch are those of each row's merged model, with one graph for prompts and
    one for steps."""
    if code is not None:
        request.getfixturevalue(code)
    layers = 2 if cache else 1  # outlined layers write a static cache in place
    case = build_case("llama", tmp_path, num_hidden_layers=layers)
    cm = case.compile(BY_INDUCTOR)
    torch.manual_seed(0)
    inputs = token_inputs(4, 5)
    settings = {**GREEDY, "max_new_tokens": 4, "cache_implementation": cache}
    got = cm.generate(**inputs, **settings, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        want = case.alone(name).generate(**one, **{**settings, "cache_implementation": None})
        assert torch.equal(got[row : row + 1], want)
    assert replaced(cm) == [layers] * 2
    cm.generate(**inputs, **settings, adapter_names=["a4", "a4", None, "a2"])
    assert cm.recompiles == 2


@pytest.mark.parametrize("code", ["node_by_node", pytest.param(None, marks=pytest.mark.slow)])
def test_bfloat16(code: str | None, tmp_path: Path, request: Any) -> None:
    if code is not None:
        request.getfixturevalue(code)

    def serve(base: Any, folders: Any, inputs: Any, names: Any) -> Any:
        cm = lorafx.compile(base, folders, options=BY_INDUCTOR, dynamic=False)
        logits = cm(**inputs, adapter_names=names).logits
        assert replaced(cm) == [0 if has_matrix_tiles() else 1]  # torch's own has these tiles
        return logits

    check_bfloat16(tmp_path, serve)
