"""What does not fit is refused, all of it at once, and the old weights serve on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from dense_merge import Case, check_mixed
from full_disk import no_file_over
from namings import new_weights, plain
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import lorafx
from lorafx.errors import BaseWeightsError, BatchError, CaptureError, CheckpointError, ConfigError

pytestmark = pytest.mark.usefixtures("fixed_sizes")

Pairs = list[tuple[str, Tensor]]
IDS = {"input_ids": torch.randint(3, 61, (3, 5), generator=torch.Generator().manual_seed(1))}
NAMES = ["a0", None, "a2"]
UP = "model.layers.0.mlp.up_proj.weight"


def as_function(pairs: Pairs) -> Any:
    """A function whose pairs all come in one buffer, which the next pair overwrites."""
    buffer = torch.empty(max(tensor.numel() for _, tensor in pairs))

    def pass_through() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in pairs:
            part = buffer[: tensor.numel()].view(tensor.shape)
            yield name, part.copy_(tensor)

    return pass_through


SOURCES: dict[str, Callable[[Pairs], Any]] = {
    "list": list,
    "mapping": dict,
    "generator": iter,
    "function": as_function,
}


@pytest.fixture(scope="module")
def served(shallow: Case) -> Any:
    return shallow.compile()


def values(cm: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in cm.model.state_dict().items()}


def same(cm: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in cm.model.state_dict().items())


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source(served: Any, shallow: Case, kind: str) -> None:
    fresh = new_weights(shallow.base, 31 + len(kind))
    served.load_weights(SOURCES[kind](list(plain(fresh).items())))
    assert same(served, plain(fresh))
    check_mixed(served, Case(fresh, shallow.folders), NAMES, IDS)


@pytest.mark.parametrize("kind", ["list", "generator", "function"])
def test_all_problems_at_once(served: Any, shallow: Case, kind: str) -> None:
    before = values(served)
    state = plain(new_weights(shallow.base, 5))
    del state["model.norm.weight"]
    state[UP] = state[UP].T.contiguous()
    pairs = [
        *state.items(),
        ("model.layers.0.mlp.upp_proj.weight", torch.zeros(3)),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(2, 24)),
        ("base_model.model.lm_head.weight", state["lm_head.weight"]),
        ("model.layers.0.input_layernorm.weight", torch.zeros(24, dtype=torch.int64)),
    ]
    del pairs[[name for name, _ in pairs].index("model.layers.0.input_layernorm.weight")]
    with pytest.raises(BaseWeightsError) as raised:
        served.load_weights(SOURCES[kind](pairs) if kind != "function" else lambda: iter(pairs))
    problems = raised.value.problems
    for text in (
        f"{UP}: the checkpoint's tensor has shape (24, 40), expected (40, 24)",
        "model.layers.0.mlp.upp_proj.weight: no place in the model; nearest: "
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight: a factor of an adapter",
        "base_model.model.lm_head.weight → lm_head.weight: a duplicate of lm_head.weight",
        "model.layers.0.input_layernorm.weight: the checkpoint's numbers are torch.int64",
        "model.norm.weight: nothing in the checkpoint",
    ):
        assert sum(problem.startswith(text) for problem in problems) == 1, text
        assert text in str(raised.value)
    assert len(problems) == 6
    assert same(served, before)
    served(**IDS, adapter_names=NAMES)


@pytest.mark.parametrize("undo", ["memory", "disk"])
def test_a_generator_that_fails_half_way(served: Any, shallow: Case, undo: Any) -> None:
    before = values(served)
    state = plain(new_weights(shallow.base, 6))

    def failing() -> Iterator[tuple[str, Tensor]]:
        for index, pair in enumerate(state.items()):
            if index == len(state) - 2:
                raise OSError("the trainer is gone")
            yield pair

    with pytest.raises(OSError, match="the trainer is gone"):
        served.load_weights(failing(), undo=undo)
    assert same(served, before)
    served(**IDS, adapter_names=NAMES)
    with pytest.raises(ConfigError, match="undo is"):
        served.load_weights(failing(), undo="never")


def test_a_full_disk(served: Any, shallow: Case) -> None:
    """Of a generator the old weights are kept there."""
    state = {name: own.clone() for name, own in served.model.state_dict().items()}
    new = ((name, own + 1) for name, own in state.items())
    with no_file_over(0), pytest.raises(CheckpointError, match=r"disk until .*TMPDIR"):
        served.load_weights(new, undo="disk")
    assert all(torch.equal(own, state[name]) for name, own in served.model.state_dict().items())


def test_a_function_that_fails_the_second_time(served: Any, shallow: Case) -> None:
    state = plain(new_weights(shallow.base, 7))
    rounds: list[int] = []

    def pairs() -> Iterator[tuple[str, Tensor]]:
        rounds.append(1)
        for index, pair in enumerate(state.items()):
            if len(rounds) == 2 and index == 3:
                yield pair[0], pair[1][:1]
            yield pair

    with pytest.raises(CheckpointError, match="it came as a different tensor the second time"):
        served.load_weights(pairs)
    with pytest.raises(CaptureError, match="partly old and partly new"):
        served(**IDS, adapter_names=NAMES)
    served.load_weights(pairs)
    served(**IDS, adapter_names=NAMES)
    assert same(served, state)


def test_some_of_them_when_asked(served: Any, shallow: Case) -> None:
    before = values(served)
    state = plain(new_weights(shallow.base, 8))
    some = {name: state[name] for name in [UP, "model.norm.weight"]}
    with pytest.raises(BaseWeightsError, match=r"lm_head.weight: nothing in the checkpoint"):
        served.load_weights(some)
    assert same(served, before)
    report = served.load_weights({**some, "extra.weight": torch.zeros(1)}, strict=False)
    assert set(report.loaded) == set(some)
    assert report.ignored == ("extra.weight",)
    assert set(report.missing) == set(state) - set(some)
    assert same(served, {**before, **some})
    with pytest.raises(BaseWeightsError, match="shape"):
        served.load_weights({UP: torch.zeros(1)}, strict=False)


def test_what_checkpoints_have_beside_the_weights(served: Any, shallow: Case) -> None:
    state = plain(new_weights(shallow.base, 9))
    (buffer,) = [name for name, _ in served.model.named_buffers() if name.endswith("inv_freq")][:1]
    report = served.load_weights({**state, buffer: torch.zeros(3)})
    assert report.ignored == (buffer,)
    assert float(served.model.get_buffer(buffer).abs().max()) > 0


def test_safetensors_files(served: Any, shallow: Case, tmp_path: Path) -> None:
    state = plain(new_weights(shallow.base, 10))
    names = list(state)
    for index, part in enumerate((names[:4], names[4:])):
        save_file({n: state[n].contiguous() for n in part}, tmp_path / f"{index}.safetensors")
    served.load_weights(tmp_path)
    assert same(served, state)
    served.model.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").is_file()
    served.load_weights(str(tmp_path / "saved"))
    assert same(served, state)
    (tmp_path / "0.safetensors").write_bytes(b"no such thing")
    for bad, message in ((tmp_path, "cannot be read"), (tmp_path / "none", "no safetensors")):
        with pytest.raises(CheckpointError, match=message):
            served.load_weights(bad)
    assert same(served, state)


@pytest.mark.parametrize("given", [3, [torch.zeros(1)], [("name", 3)], [(1, torch.zeros(1))]])
def test_no_weights_at_all(served: Any, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"weights are|a tensor is needed"):
        served.load_weights(given)


def test_its_own_tensors(served: Any) -> None:
    """Weights that change places: what is written first may be what is read next."""
    before = values(served)
    served.load_weights(served.model.state_dict())
    assert same(served, before)
    state = dict(served.model.state_dict())
    k, v = (f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "kv")
    state[k], state[v] = state[v], state[k]
    with pytest.raises(BaseWeightsError, match="shares memory with the weights of this model"):
        served.load_weights(iter(state.items()))
    assert same(served, before)
    served.load_weights(state)
    assert same(served, {**before, k: before[v], v: before[k]})


def test_casts_and_what_is_no_plain_number(served: Any, shallow: Case) -> None:
    state = plain(new_weights(shallow.base, 12))
    served.load_weights({name: tensor.to(torch.bfloat16) for name, tensor in state.items()})
    assert same(served, {name: tensor.bfloat16().float() for name, tensor in state.items()})
    for dtype in (torch.float8_e4m3fn, torch.int8):
        with pytest.raises(BaseWeightsError, match="without a scale"):
            served.load_weights({**state, UP: state[UP].to(dtype)})
    with pytest.raises(BaseWeightsError, match=r"do not become|meta"):
        served.load_weights({**state, UP: state[UP].to(torch.complex64)})


class Stored(nn.Module):
    """A weight in int8 codes, and one in a tensor that wraps two others."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        pair = TwoTensor(torch.ones(4, 4), torch.ones(4, 4))
        self.pair = nn.Parameter(pair, requires_grad=False)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(x)}


def test_floats_are_not_put_where_a_weight_is_quantised() -> None:
    model = Stored()
    cm = lorafx.compile(model.eval(), lorafx.LoraConfig(), options={"lowering": "reference"})
    codes, pair = (
        torch.full((4, 4), 3, dtype=torch.int8),
        TwoTensor(torch.randn(4, 4), torch.randn(4, 4)),
    )
    head = {"head.weight": torch.randn(4, 4), "head.bias": torch.randn(4)}
    with pytest.raises(BaseWeightsError) as raised:
        cm.load_weights({"codes": torch.randn(4, 4), "pair": torch.randn(4, 4), **head})
    text = str(raised.value)
    assert "codes: it is quantised here (torch.int8)" in text
    assert "pair: it is kept here as a TwoTensor, not as plain numbers" in text
    with pytest.raises(BaseWeightsError, match="is a TwoTensor; give the plain whole tensor"):
        cm.load_weights({"codes": codes, "pair": pair, **head, "head.weight": pair})
    cm.load_weights({"codes": codes, "pair": pair, **head})
    assert torch.equal(model.codes, codes)
    assert torch.equal(model.pair.a, pair.a)
    assert torch.equal(model.pair.b, pair.b)
    assert torch.equal(model.head.weight, head["head.weight"])


def test_it_waits_for_running_calls_and_is_refused_inside_one(served: Any, shallow: Case) -> None:
    state = plain(new_weights(shallow.base, 13))
    started, done, inside = threading.Event(), threading.Event(), []

    def hook(*_: Any) -> None:
        if threading.current_thread() is caller and not started.is_set():
            started.set()
            with pytest.raises(BatchError, match="a call is running"):
                served.load_weights(state)
            inside.append(done.wait(0.5))  # the other thread has to wait for this call

    def push() -> None:
        started.wait()
        served.load_weights(state)
        done.set()

    caller = threading.current_thread()
    pusher = threading.Thread(target=push)
    pusher.start()
    served._session.call(hook, ["a0"])
    pusher.join()
    assert inside == [False]
    assert same(served, state)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.relu(self.middle(self.embed(ids))))}


@pytest.mark.parametrize("kind", SOURCES)
def test_tied_weights(kind: str) -> None:
    torch.manual_seed(0)
    base = Tied().eval().requires_grad_(False)
    cm = lorafx.compile(base, lorafx.LoraConfig(), options={"lowering": "reference"})
    fresh = new_weights(base, 3)
    state = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    source = SOURCES[kind]
    for left_out in ((), ("head.weight",), ("embed.weight",)):
        pairs = [pair for pair in state.items() if pair[0] not in left_out]
        report = cm.load_weights(source(pairs))
        assert set(report.loaded) == set(state)
        assert same(cm, state)
        assert cm.model.head.weight is cm.model.embed.weight
    ids = torch.randint(0, 20, (2, 3))
    assert torch.equal(cm(ids, adapter_names=[None, None])["logits"], fresh(ids)["logits"])
    differing = [*state.items()]
    differing[-1] = ("head.weight", state["head.weight"] + 1)
    with pytest.raises(BaseWeightsError, match=r"ties it to embed.weight, and their values differ"):
        cm.load_weights(source(differing))
    assert same(cm, state)


class Aliased(nn.Module):
    """One block twice, which `state_dict()` lists twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8))
        self.second = self.first

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(self.first(x))}


def test_alias_paths() -> None:
    cm = lorafx.compile(Aliased().eval(), lorafx.LoraConfig(), options={"lowering": "reference"})
    state = {name: torch.randn_like(t) for name, t in cm.model.first.state_dict().items()}
    for paths in (["first"], ["second"], ["second", "first"]):
        cm.load_weights([(f"{path}.{n}", t) for path in paths for n, t in state.items()])
        assert all(torch.equal(t, state[n]) for n, t in cm.model.first.state_dict().items())
    before = values(cm)
    pairs = [(f"first.{n}", t) for n, t in state.items()]
    pairs.append(("second.0.weight", state["0.weight"] + 1))
    with pytest.raises(BaseWeightsError, match=r"ties it to first.0.weight"):
        cm.load_weights(pairs)
    assert same(cm, before)


def test_what_a_family_leaves_out_is_ignored_under_any_prefix() -> None:
    """transformers' Qwen3.5 has no heads that predict further tokens; its checkpoints do."""
    family = next(f for f in tiny.families("causal") if f.model_type == "qwen3_5_text")
    model = tiny.build(family, num_hidden_layers=1, layer_types=["full_attention"])
    cm = lorafx.compile(model, lorafx.LoraConfig(), options={"lowering": "reference"})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for prefix in ("", "model.", "module.", "_orig_mod.", "base_model.model."):
        extra = {f"{prefix}mtp.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}
        assert cm.load_weights({**state, **extra}).ignored == tuple(extra)
        with pytest.raises(BaseWeightsError, match="no place in the model"):
            cm.load_weights({**state, f"{prefix}other.weight": torch.zeros(3)})
