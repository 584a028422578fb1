"""Warm-up: nothing is compiled after it, and nothing else has changed."""

from __future__ import annotations

import inspect
import random
import sys

import pytest
import torch
from dense_merge import Case, check_mixed, error, random_base
from tiny_models import FAMILIES, token_inputs
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lorafx
from lorafx.errors import ConfigError
from lorafx.program.argument_roles import CACHES
from lorafx.runtime.example_inputs import derived_example

pytestmark = pytest.mark.any_sizes

FEED = FAMILIES["plain"].inputs


def frames() -> int:
    """Frames that Dynamo has compiled in this process."""
    return counters["frames"]["ok"]


class Captured:
    """Graphs of a compiled model since it was made; asked again, those that came since."""

    def __init__(self, cm: lorafx.CompiledModel) -> None:
        self.cm, self.before = cm, (cm.recompiles, frames())

    @property
    def more(self) -> bool:
        return (self.cm.recompiles, frames()) != self.before


# --- nothing is compiled afterwards ---
class Warm:
    """`served` is warmed up for `forward` and decoding, with `graphs` graphs."""

    def __init__(self, case: Case) -> None:
        self.served = case.compile()
        self.served.warmup(batch_sizes=(2,), lengths=(6,), generate=False)
        self.graphs = self.served.recompiles


@pytest.fixture(scope="module")
def warm(llama: Case) -> Warm:
    return Warm(llama)


def test_forward_and_decode_compile_nothing(llama: Case, warm: Warm) -> None:
    """Prompts and single tokens with a cache, any mix and none. (One request:
    `test_example_inputs_of_a_model_without_a_configuration`.)"""
    cm = warm.served
    cache = next(n for n in CACHES if n in inspect.signature(llama.base.forward).parameters)
    captured = Captured(cm)
    assert warm.graphs == 4  # {prompt, decode} × {base, adapters}
    torch.manual_seed(0)
    mixes = (["a0", None, "a2"], ["a3"] * 2, [None] * 4, ["a4", "a0", None, "a1"])
    for length, names in zip((5, 2, 7, 4), mixes, strict=True):
        inputs = token_inputs(len(names), length)
        output = cm(**inputs, adapter_names=names)
        longer = torch.cat([inputs["attention_mask"], torch.ones(len(names), 1).long()], 1)
        cm(
            input_ids=inputs["input_ids"][:, -1:],
            attention_mask=longer,
            **{cache: output[cache]},
            adapter_names=names,
        )
    check_mixed(cm, llama, ["a0", None, "a1"], token_inputs(3, 5))
    assert not captured.more


MIXES = {
    2: ((["a0", None, "a1"], 5), ([None] * 2, 9), (["a3", "a3", "a0", None], 3)),
    1: ((["a0"], 5), ([None], 9)),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_generate_compiles_nothing(llama: Case, warm: Warm, size: int) -> None:
    """Prompts of equal lengths and padded ones, beams, batches of any mix and of none. Quickly,
    step by step: `test_forward_and_decode_compile_nothing`."""
    cm = warm.served
    before = cm.recompiles
    cm.warmup(batch_sizes=(size,), lengths=(8,), generate=True)
    # {prompt, steps} × {base, adapters}, and where there are several the same with padding
    assert cm.recompiles - before == 4 * size
    captured = Captured(cm)
    torch.manual_seed(0)
    fixed = {"pad_token_id": 0, "max_new_tokens": 4, "do_sample": False}
    for names, length in MIXES[size]:
        inputs = token_inputs(len(names), length)
        got = cm.generate(**inputs, **fixed, adapter_names=names)
        cm.generate(inputs["input_ids"], **fixed, adapter_names=names)
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            want = llama.alone(name).generate(**one, **fixed)[0]
            assert torch.equal(got[row][: len(want)], want)
    names = ["a1", None] if size == 2 else ["a2"]
    fixed["num_beams"], inputs = size, token_inputs(size, 5)
    got = cm.generate(**inputs, **fixed, adapter_names=names)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        want = llama.alone(name).generate(**one, **fixed)[0]
        assert torch.equal(got[row][: len(want)], want)
    assert not captured.more


class Embedded(nn.Module):
    """One linear behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 6)
        self.up = nn.Linear(6, 7)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.up(self.embed(ids))}


def test_example_inputs_of_a_model_without_a_configuration(small) -> None:
    case = small(Embedded, ["up"], ["embed"])
    torch.manual_seed(0)
    by_name, by_position = case.compile(), case.compile()
    by_name.warmup(FEED(2, 4), batch_sizes=(1,))
    by_position.warmup((FEED(2, 4)["ids"],), batch_sizes=(1,))
    for cm in (by_name, by_position):
        captured = Captured(cm)
        for names in (["a", "b", None], ["b"], [None] * 4, [None]):
            inputs = FEED(len(names), 6)
            got = cm(**inputs, adapter_names=names)["logits"]
            assert error(got, case.expected(names, inputs)) <= 1e-5
            cm(inputs["ids"], adapter_names=names)  # the same graph, given by position
        assert not captured.more
        assert cm.recompiles == 4  # {base, adapters} × {one request, several}


# --- nothing else changes ---
def _state(cm: lorafx.CompiledModel) -> tuple[object, ...]:
    session = cm._session
    store, runtime = session.store, session.program.runtime
    return (
        cm.adapters,
        store.resident,
        list(store.resident),
        store.pinned,
        session.default,
        cm.memory(),
        runtime.rows,
        runtime.active,
        session.program.batch.touched,
        session.running,
        torch.get_rng_state().tolist(),
        random.getstate(),
        cm.training,
        [module.training for module in cm._orig_mod.modules()],
        torch.is_grad_enabled(),
    )


def test_adapters_slots_pins_and_random_states_are_as_before(plain: Case) -> None:
    """Also where every slot is taken, all but one by pinned adapters."""
    cm = lorafx.compile(
        plain.model(),
        lorafx.LoraConfig(max_adapters=3, max_rank=8),
        adapters=plain.folders,
        options={"lowering": "reference"},
    )
    torch.manual_seed(3)
    inputs = FEED(3, 4)
    names = ["a1", "a3", "a0"]
    cm.pin_adapter("a3")
    cm.pin_adapter("a0")
    cm.set_adapter("a1")
    before_logits = cm(**inputs, adapter_names=names)["logits"]
    before = _state(cm)
    cm.warmup(inputs, batch_sizes=(1, 5))
    assert _state(cm) == before
    captured = Captured(cm)
    assert torch.equal(cm(**inputs, adapter_names=names)["logits"], before_logits)
    assert error(cm(**inputs)["logits"], plain.expected(["a1"] * 3, inputs)) <= 1e-5
    check_mixed(cm, plain, ["a2", None, "a0"], inputs)  # a2 takes the slot of a1
    assert not captured.more


def test_a_model_without_adapters_is_warmed_up_for_those_to_come(plain: Case) -> None:
    cm = lorafx.compile(
        plain.model(), lorafx.LoraConfig(max_rank=8), options={"lowering": "reference"}
    )
    torch.manual_seed(0)
    cm.warmup(FEED(2, 3), batch_sizes=(1,))
    captured = Captured(cm)
    assert cm.adapters == ()
    assert cm.memory()["host"] == 0
    assert cm._session.store.resident == {}
    for name in ("a0", "a1"):
        cm.load_adapter(plain.folders[name], name)
    check_mixed(cm, plain, ["a0", None, "a1"], FEED(3, 4))
    assert not captured.more


class Failing(nn.Module):
    """Raises for batches of three; a buffer counts its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.shape[0] == 3:
            raise RuntimeError("no batch of three")
        self.calls += 1
        noise = torch.rand(()) * 0
        return {"logits": self.up(x) + noise}


@pytest.mark.parametrize("batch_sizes", [(1, 2), (2, 3)])
def test_a_warmup_that_raises_leaves_no_trace(small, batch_sizes: tuple[int, ...]) -> None:
    """Nor does one that does not: dummies, buffers and random numbers are put back."""
    case = small(Failing, ["up"])
    cm = case.compile()
    inputs = {"x": torch.randn(2, 12)}
    names = ["a", None]
    want = cm(**inputs, adapter_names=names)["logits"]
    calls, before = cm._orig_mod.calls.clone(), _state(cm)
    if 3 in batch_sizes:
        with pytest.raises(RuntimeError, match="no batch of three"):
            cm.warmup(inputs, batch_sizes=batch_sizes)
    else:
        cm.warmup(inputs, batch_sizes=batch_sizes)
    assert _state(cm) == before
    assert torch.equal(cm._orig_mod.calls, calls)
    assert torch.equal(cm(**inputs, adapter_names=names)["logits"], want)
    assert cm.adapters == ("a", "b")


def test_progress_is_shown_on_a_terminal_only(
    small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = small(Embedded, ["up"])
    case.compile().warmup(FEED(2, 3), batch_sizes=(2,))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    case.compile().warmup(FEED(2, 3), batch_sizes=(2,))
    shown = capsys.readouterr().err
    assert "warm-up 1 of 3: forward, 2 requests, no adapter" in shown
    assert "warm-up 3 of 3: forward, 2 requests, a mix: " in shown
    assert "compiling graph 0 base of Embedded, first call: " in shown


# --- what cannot be done ---
def test_bad_arguments(plain: Case, llama: Case) -> None:
    cm = plain.compile()
    with pytest.raises(ConfigError, match=r"does not declare token ids .* warmup"):
        cm.warmup()
    for arguments, message in (
        ({"batch_sizes": ()}, "batch_sizes=.* positive integers"),
        ({"lengths": (4, -1)}, "lengths=.* positive integers"),
        ({"generate": True}, "PlainModel cannot generate"),
        ({"generate": {"num_beams": 2}}, "PlainModel cannot generate"),
    ):
        with pytest.raises(ConfigError, match=message):
            cm.warmup(FEED(1, 2), **arguments)
    for inputs in (3, "ids"):
        with pytest.raises(ConfigError, match="inputs are the arguments of a call"):
            cm.warmup(inputs)
    with pytest.raises(ConfigError, match="example_inputs do not fit"):
        cm.warmup({"no_such": torch.zeros(1)})
    assert cm.recompiles == 0
    cm.detach()
    with pytest.raises(lorafx.CaptureError, match="detached"):
        cm.warmup(FEED(1, 2))
    with pytest.raises(ConfigError, match=r"generate=.* got 3"):
        llama.compile().warmup(generate=3)


def test_the_configuration_says_what_ids_there_are() -> None:
    """No id outside the vocabulary, and none that means something to the model."""
    model = random_base("llama", vocab_size=9, pad_token_id=0)
    example = derived_example(model, torch.device("cpu"), 3, 8)
    assert example.named["input_ids"].shape == example.named["attention_mask"].shape == (3, 8)
    special = {model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id}
    assert set(example.named["input_ids"].flatten().tolist()) == set(range(9)) - special
