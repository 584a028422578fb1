"""Graphs: captured once for every mix, adapter, batch size and length, and never shared wrongly."""

from __future__ import annotations

import random

import pytest
import torch
import torch._dynamo
from dense_merge import check_mixed, error
from tiny_models import FAMILIES, token_inputs
from torch._dynamo.utils import counters

from lorafx.errors import CaptureError


def frames() -> int:
    """Frames that Dynamo has compiled in this process."""
    return counters["frames"]["ok"]


def test_twenty_mixes_and_a_swap_on_one_graph(shallow):
    cm = shallow.compile(options={"verify": "off"})
    draw = random.Random(0)
    torch.manual_seed(0)
    check_mixed(cm, shallow, ["a0", None, "a1", "a2"], token_inputs(4, 6))
    captured, seen, mixes = cm.recompiles, frames(), set()
    while len(mixes) < 20:
        names = tuple(draw.choice([None, "a0", "a1", "a2", "a3", "a4"]) for _ in range(4))
        if any(names):
            mixes.add(names)
            inputs = token_inputs(4, draw.randrange(2, 12))
            if len(mixes) % 5 == 0:
                check_mixed(cm, shallow, names, inputs)
            else:
                cm(**inputs, adapter_names=names)
    cm.unload_adapter("a2")
    cm.load_adapter(shallow.folders["a4"], "a2")  # another adapter under a known name
    inputs = token_inputs(4, 5)
    want = shallow.expected(["a4", "a0", None, "a4"], inputs)
    got = cm(**inputs, adapter_names=["a2", "a0", None, "a4"]).logits
    assert error(got, want) <= 1e-5
    check_mixed(cm, shallow, ["a3", "a1", "a0"], token_inputs(3, 7))
    assert (cm.recompiles, frames()) == (captured, seen)


@pytest.fixture(scope="module")
def square(plain):
    """Captured for a batch as long as the sequence: the graph is for any."""
    cm = plain.compile()
    torch.manual_seed(0)
    check_mixed(cm, plain, ["a0", None, "a1", "a3", "a2"], FAMILIES["plain"].inputs(5, 5))
    assert cm.recompiles == 1
    return cm


def test_batch_as_long_as_the_sequence_is_no_common_symbol(plain, square):
    """(5, 5) then (5, 7): with duck shaping batch and length would be one symbol."""
    torch.manual_seed(0)
    cm, feed = square, FAMILIES["plain"].inputs
    names = ["a0", None, "a1", "a3", "a2"]
    check_mixed(cm, plain, names, feed(5, 5))
    captured = cm.recompiles
    check_mixed(cm, plain, names, feed(5, 7))
    check_mixed(cm, plain, names[:4], feed(4, 5))
    assert cm.recompiles == captured == 1
    assert torch.fx.experimental._config.use_duck_shape  # the user's own setting is back


def test_the_recompile_limit_is_an_error_not_silent_eager(plain):
    cm = plain.compile(options={"recompile_limit": 1}, dynamic=False)
    feed = FAMILIES["plain"].inputs
    torch.manual_seed(0)
    check_mixed(cm, plain, ["a0", "a1"], feed(2, 3))
    with pytest.raises(CaptureError, match=r"PlainModel has 1 graphs.*recompile_limit"):
        cm(**feed(3, 4), adapter_names=["a0", "a1", None])
    check_mixed(cm, plain, ["a0", "a1"], feed(2, 3))
