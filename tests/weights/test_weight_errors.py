"""What does not fit is refused, all of it at once, and the old weights serve on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import Case, check_mixed
from namings import new_weights, plain
from safetensors.torch import save_file
from torch import Tensor, nn

import lorafx
from lorafx.errors import BaseWeightsError, BatchError, CaptureError, CheckpointError, ConfigError
from lorafx.layers import ReplicatedLinear, UnquantizedLinearMethod, load_weights
from lorafx.runtime.requests import Requests

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
def served(llama: Case) -> Any:
    return llama.compile()


def values(cm: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in cm._orig_mod.state_dict().items()}


def same(cm: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in cm._orig_mod.state_dict().items())


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source(served: Any, llama: Case, kind: str) -> None:
    fresh = new_weights(llama.base, 31 + len(kind))
    served.load_weights(SOURCES[kind](list(plain(fresh).items())))
    assert same(served, plain(fresh))
    check_mixed(served, Case(fresh, llama.folders), NAMES, IDS)


@pytest.mark.parametrize("kind", ["list", "function"])
def test_all_problems_at_once(served: Any, llama: Case, kind: str) -> None:
    before = values(served)
    state = plain(new_weights(llama.base, 5))
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


@pytest.mark.parametrize("lost", [lambda t: t.to("meta"), Tensor.to_sparse, Tensor.to_sparse_csr])
def test_tensors_without_dense_numbers(served: Any, llama: Case, lost: Any) -> None:
    before = values(served)
    state = plain(new_weights(llama.base, 8))
    with pytest.raises(BaseWeightsError, match=f"{UP}: the checkpoint's .* is no dense tensor"):
        served.load_weights({**state, UP: lost(state[UP])})
    assert same(served, before)
    served(**IDS, adapter_names=NAMES)


def test_what_is_no_source(served: Any, llama: Case, tmp_path: Path) -> None:
    for wrong in (llama.base, lambda: None):
        with pytest.raises(ConfigError, match=r"weights are .* got (NoneType|LlamaForCausalLM)"):
            served.load_weights(wrong)
    for index in ("[1]", '{"weight_map": {"a": 5}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CheckpointError, match="is no index of safetensors files"):
            served.load_weights(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be read: .* too long"):
        served.load_weights("a" * 5000)


def test_a_generator_that_fails_half_way(served: Any, llama: Case) -> None:
    before = values(served)
    state = plain(new_weights(llama.base, 6))

    def failing() -> Iterator[tuple[str, Tensor]]:
        for index, pair in enumerate(state.items()):
            if index == len(state) - 2:
                raise OSError("the trainer is gone")
            yield pair

    with pytest.raises(OSError, match="the trainer is gone"):
        served.load_weights(failing())
    assert same(served, before)
    served(**IDS, adapter_names=NAMES)


def test_a_function_that_fails_the_second_time(served: Any, llama: Case) -> None:
    state = plain(new_weights(llama.base, 7))
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


def test_some_of_them_when_asked(served: Any, llama: Case) -> None:
    before = values(served)
    state = plain(new_weights(llama.base, 8))
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


def test_safetensors_files(served: Any, llama: Case, tmp_path: Path) -> None:
    state = plain(new_weights(llama.base, 10))
    names = list(state)
    for index, part in enumerate((names[:4], names[4:])):
        save_file({n: state[n].contiguous() for n in part}, tmp_path / f"{index}.safetensors")
    served.load_weights(tmp_path)
    assert same(served, state)
    served._orig_mod.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
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
    """Weights that change places: what is written first would be what is read next."""
    before = values(served)
    served.load_weights(served._orig_mod.state_dict())
    assert same(served, before)
    state = dict(served._orig_mod.state_dict())
    k, v = (f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "kv")
    state[k], state[v] = state[v], state[k]
    with pytest.raises(BaseWeightsError, match="shares memory with the weights of this model"):
        served.load_weights(state)
    assert same(served, before)
    served.load_weights(iter(state.items()))  # copied first
    assert same(served, {**before, k: before[v], v: before[k]})


def test_casts_and_what_is_no_plain_number(served: Any, llama: Case) -> None:
    state = plain(new_weights(llama.base, 12))
    served.load_weights({name: tensor.to(torch.bfloat16) for name, tensor in state.items()})
    assert same(served, {name: tensor.bfloat16().float() for name, tensor in state.items()})
    for dtype in (torch.float8_e4m3fn, torch.int8):
        with pytest.raises(BaseWeightsError, match="without a scale"):
            served.load_weights({**state, UP: state[UP].to(dtype)})
    with pytest.raises(BaseWeightsError, match=r"do not become|meta"):
        served.load_weights({**state, UP: state[UP].to(torch.complex64)})


def test_it_waits_for_running_calls_and_is_refused_inside_one(served: Any, llama: Case) -> None:
    state = plain(new_weights(llama.base, 13))
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
    served._session.call(lambda: hook, Requests(("a0",)))
    pusher.join()
    assert inside == [False]
    assert same(served, state)


@pytest.mark.quick
def test_a_loader_that_is_not_of_lorafx_is_never_called() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    model[0].weight.weight_loader = lambda *_: pytest.fail("called")  # type: ignore[union-attr]
    cm = lorafx.compile(model, lorafx.LoraConfig(["0"]), options={"lowering": "reference"})
    state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(BaseWeightsError, match=r"0.weight: it has a weight_loader .*strict=False"):
        cm.load_weights(state)
    report = cm.load_weights({"0.bias": state["0.bias"]}, strict=False)
    assert (report.loaded, report.missing) == (("0.bias",), ("0.weight",))


class Failing(UnquantizedLinearMethod):
    fail = False

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.fail:
            raise ValueError("no more memory")


@pytest.mark.quick
def test_a_quant_method_that_fails_after_loading() -> None:
    method, x = Failing(), torch.ones(2, 4)
    model = nn.Sequential(ReplicatedLinear(4, 3, quant_method=method)).eval()
    state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    load_weights(model, state)
    cm = lorafx.compile(model, lorafx.LoraConfig(["0"]), options={"lowering": "reference"})
    method.fail = True
    with pytest.raises(ValueError, match="no more memory"):
        cm.load_weights(state)
    with pytest.raises(CaptureError, match="partly old and partly new"):
        cm(x)
    method.fail = False
    cm.load_weights(state)
    assert torch.equal(cm(x), torch.full((2, 3), 5.0))
