"""Models that their users call and compile themselves, in blocks of `lorafx.adapters`."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attached import attached, check, check_base, compiled, fresh_dynamo, graphs, served  # noqa: F401  (the fixture)
from dense_merge import REFERENCE, Case, error, save_adapter
from sums import SumCase
from tiny_models import FAMILIES, token_inputs
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lorafx
from lorafx.errors import (
    BatchError,
    CapacityError,
    CaptureError,
    CheckpointError,
    ConfigError,
    UnknownAdapterError,
)

feed = FAMILIES["plain"].inputs
CALLS: dict[str, Callable[[Any], Any]] = {"compiled": compiled, "eager": lambda model: model}


@pytest.mark.any_sizes
@pytest.mark.parametrize("how", CALLS)
def test_mixes_and_sizes_on_one_graph(plain: Case, how: str) -> None:
    torch.manual_seed(0)
    model = attached(plain)
    call = CALLS[how](model)
    check_base(call, plain, feed(3, 5))
    check(call, model, plain, ["a0", None, "a1"], feed(3, 5))
    captured = graphs(model)
    check(call, call, plain, ["a2", "a3", "a2", "a4"], feed(4, 9))
    check(call, model, plain, ["a4", "__base__"], feed(2, 3))
    check(call, model, plain, ["a0", None, "a1", "a3", "a2"], feed(5, 5))
    check_base(call, plain, feed(6, 4))
    assert graphs(model) == captured == 1


def test_the_graph_of_a_function_breaks_there(plain: Case) -> None:
    model, inputs = attached(plain), feed(3, 5)
    call = torch.compile(lambda **given: {"logits": model(**given)["logits"] + 0}, backend="lorafx")
    for _ in range(2):
        check(call, model, plain, ["a0", None, "a1"], inputs)
    check_base(call, plain, inputs)
    whole = torch.compile(lambda **given: model(**given), backend="lorafx", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"), torch.no_grad():
        whole(**inputs)


def test_blocks(plain: Case) -> None:
    torch.manual_seed(0)
    model, inputs = attached(plain), feed(2, 4)
    call = compiled(model)
    want = {name: plain.expected([name] * 2, inputs) for name in ("a0", "a1")}
    with torch.no_grad(), lorafx.adapters(model, "a0"):
        assert error(call(**inputs)["logits"], want["a0"]) <= 1e-5
        with lorafx.adapters(call, ["a1", "a1"]):
            assert error(call(**inputs)["logits"], want["a1"]) <= 1e-5
            with lorafx.adapters(model, None):
                assert error(call(**inputs)["logits"], plain.expected([None] * 2, inputs)) <= 1e-5
        with pytest.raises(RuntimeError, match="of the caller"), lorafx.adapters(model, "a1"):
            raise RuntimeError("of the caller")
        with pytest.raises(UnknownAdapterError, match="no adapter named 'a9'; nearest: a"):
            lorafx.adapters(model, ["a1", "a9"]).__enter__()
        assert error(call(**inputs)["logits"], want["a0"]) <= 1e-5
    check_base(call, plain, inputs)
    check_base(model, plain, inputs)


def test_names_that_do_not_fit_the_batch(plain: Case) -> None:
    model = lorafx.attach(
        plain.model(), lorafx.LoraConfig(max_adapters=1), adapters=plain.folders, options=REFERENCE
    )
    for names, rows, kind, message in (
        (["a0", "a1"], 4, BatchError, "adapter_names has 2 entries, but the batch has 4 rows"),
        (["a0", "a1"], 1, BatchError, "adapter_names has 2 entries, but the batch has 1 row;"),
        (7, 1, ConfigError, "adapter_names must be a list"),
        ([], 1, BatchError, "adapter_names is empty"),
        (["a0", "a1"], 2, CapacityError, "2 distinct adapters"),
    ):
        with pytest.raises(kind, match=message):
            served(model, model, names, feed(rows, 3))  # type: ignore[arg-type]
    check(model, model, plain, ["a0", None], feed(2, 3))


def test_sums(plain: Case) -> None:
    torch.manual_seed(0)
    case, inputs = SumCase.of(plain), feed(3, 4)
    model = lorafx.attach(
        case.model(), lorafx.LoraConfig(max_rank=16), adapters=case.folders, options=REFERENCE
    )
    mix: Any = {"a0": 0.7, "a1": 0.3}
    for names in ([mix, None, {"a2": 0.5}], ["a1", {"a1": -2.0, "a0": 1.0}, mix]):
        assert error(served(model, model, names, inputs), case.expected(names, inputs)) <= 1e-5
    assert error(served(model, model, mix, inputs), case.expected([mix] * 3, inputs)) <= 1e-5
    with lorafx.adapters(model, [mix]), pytest.raises(BatchError, match="being served"):
        lorafx.unload_adapter(model, "a0")


@pytest.mark.any_sizes
@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_generate(llama: Case, beams: int) -> None:
    torch.manual_seed(0)
    model, inputs, names = attached(llama), token_inputs(3, 6), ["a1", None, "a0"]
    fixed = {"pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 3, "do_sample": False}
    with lorafx.adapters(model, names):
        got = model.generate(**inputs, **fixed, num_beams=beams)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = llama.alone(name).generate(**one, **fixed, num_beams=beams)
        assert torch.equal(got[row], alone[0])
    base = model.generate(**inputs, **fixed, num_beams=beams)
    assert torch.equal(base, llama.base.generate(**inputs, **fixed, num_beams=beams))
    with pytest.raises(BatchError, match="adapter_names has 3 entries, but the batch has 6 rows"):
        served(model, model, names, token_inputs(6, 4))


def test_gradients_are_refused_with_adapters_and_the_base_trains(plain: Case) -> None:
    torch.manual_seed(0)
    model, inputs = attached(plain).requires_grad_(True), feed(2, 4)
    call, twin = compiled(model), plain.model().requires_grad_(True)
    with (
        pytest.raises(CaptureError, match=r"torch\.no_grad\(\) or torch\.inference_mode\(\)"),
        lorafx.adapters(model, ["a0", "a1"]),
    ):
        call(**inputs)
    for trained in (call, twin):
        trained(**inputs)["logits"].square().mean().backward()
    got, want = dict(model.named_parameters()), dict(twin.named_parameters())
    assert all(torch.equal(got[name].grad, want[name].grad) for name in want)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            check(call, model, plain, ["a0", None], inputs)


def test_adapters_come_and_go(plain: Case, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, inputs = attached(plain), feed(2, 4)
    check(model, model, plain, ["a0", "a1"], inputs)
    captured = graphs(model)
    folder = save_adapter(plain.base, tmp_path / "new", rank=4, targets=["up", "down"], seed=9)
    lorafx.load_adapter(model, folder, "new")
    got, base = served(model, model, ["new", None], inputs), plain.expected([None] * 2, inputs)
    assert error(got[:1], base[:1]) > 1e-3
    assert error(got[1:], base[1:]) <= 1e-5
    with pytest.raises(CheckpointError, match="holds no adapter weights"):
        lorafx.load_adapter(model, tmp_path, "none")
    with pytest.raises(BatchError, match="'new' is being served"), lorafx.adapters(model, "new"):
        lorafx.unload_adapter(model, "new")
    lorafx.unload_adapter(compiled(model), "new")
    with pytest.raises(UnknownAdapterError):
        served(model, model, ["new", None], inputs)
    assert graphs(model) == captured


@pytest.mark.parametrize(
    "first", ["attach", pytest.param("torch.compile", marks=pytest.mark.slow), "a call"]
)
def test_attached_and_detached(plain: Case, first: str) -> None:
    """Nothing is compiled again after a call of the base that follows `detach`."""
    model, inputs = plain.model(), feed(2, 4)
    call = None if first == "attach" else compiled(model, options=REFERENCE)
    if call is not None and first == "a call":
        check_base(call, plain, inputs)
    assert lorafx.attach(model, plain.folders, options=REFERENCE) is model
    call = compiled(model, options=REFERENCE) if call is None else call
    check(call, model, plain, ["a0", "a1"], inputs)
    check_base(call, plain, inputs)
    with pytest.raises(CaptureError, match="not inside"), lorafx.adapters(model, "a0"):
        lorafx.detach(model)
    assert lorafx.detach(call) is model
    assert not {"forward", "generate"} & set(vars(model))
    check_base(call, plain, inputs)
    seen = counters["stats"]["unique_graphs"]
    check_base(call, plain, inputs)
    assert counters["stats"]["unique_graphs"] == seen
    with pytest.raises(ConfigError, match="carries no LoRA"):
        lorafx.unload_adapter(model, "a0")
    lorafx.attach(model, {"other": plain.folders["a2"]}, options=REFERENCE)
    got = served(call, model, ["other", None], inputs)
    assert error(got, plain.expected(["a2", None], inputs)) <= 1e-5


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    made: nn.Module = torch.load(file, weights_only=False)
    return made


#: As `deepcopy` does, they ask the model by `__reduce_ex__`.
COPIES = (lambda model: pickle.loads(pickle.dumps(model)), saved)
SLOW = [pytest.param(copied, marks=pytest.mark.slow) for copied in COPIES]


@pytest.mark.parametrize("copied", [copy.deepcopy, *SLOW])
def test_copies_are_the_base_of_their_own(plain: Case, copied: Callable[[Any], Any]) -> None:
    model, inputs = attached(plain), feed(2, 4)
    for names in ("a0", ["a0", None]):
        with lorafx.adapters(model, names):
            twin = copied(model)
            check_base(twin, plain, inputs)
    with torch.no_grad():
        twin.up.weight.zero_()
    check(model, model, plain, ["a0", None], inputs)
    with pytest.raises(ConfigError, match="carries marks of another model"):
        lorafx.adapters(twin, "a0").__enter__()
    twin.load_state_dict(plain.base.state_dict())
    lorafx.attach(lorafx.detach(twin), plain.folders, options=REFERENCE)
    check(twin, twin, plain, ["a0", None], inputs)


def test_models_that_cannot_be_attached_or_served(plain: Case) -> None:
    model = attached(plain)
    with pytest.raises(CaptureError, match="already carries a LoRA mark"):
        lorafx.attach(model, plain.folders)
    with pytest.raises(CaptureError, match=r"wrapped by torch\.compile"):
        lorafx.attach(compiled(plain.model()), plain.folders)
    outer = nn.ModuleDict({"inner": model})
    with pytest.raises(ConfigError, match="is part of, a model that LoRA was attached to"):
        lorafx.adapters(outer, "a0").__enter__()
    with pytest.raises(ConfigError, match="use the compiled model itself"):
        lorafx.adapters(plain.compile(), "a0").__enter__()


def test_its_signature_and_hooks_are_the_model_s(plain: Case) -> None:
    signature = inspect.signature(plain.base.forward)
    model, inputs, seen = attached(plain), feed(2, 4), []
    assert inspect.signature(model.forward) == signature
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.register_forward_hook(lambda *_: seen.append("after"))
    for call in (model, compiled(model)):
        seen.clear()
        check(call, model, plain, ["a0", None], inputs)
        assert seen == ["before", "after"]


def test_a_model_that_is_a_site_itself() -> None:
    lone, x, y = nn.Linear(6, 9).eval(), torch.randn(3, 2, 6), nn.functional.linear
    A, B = torch.randn(2, 6), torch.randn(9, 2)
    factors = {"base_model.model.lora_A.weight": A, "base_model.model.lora_B.weight": B}
    source = lorafx.AdapterSource(factors, config={"r": 2, "lora_alpha": 2, "target_modules": [""]})
    lorafx.attach(lone, {"a": source}, options=REFERENCE)
    with torch.no_grad(), lorafx.adapters(lone, ["a", None, "a"]):
        for _ in range(2):
            got = lone(x)
            want = y(x, lone.weight, lone.bias)
            want[[0, 2]] += y(y(x, A), B)[[0, 2]]
            assert error(got, want) <= 1e-5


@pytest.mark.parametrize("break_graph", [False, True])
def test_two_models_of_one_class(small: Callable[..., Case], break_graph: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.w = nn.Linear(6, 6), nn.Linear(6, 9)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.tanh(self.first(x))
            if break_graph:
                torch._dynamo.graph_break()
            return {"logits": self.w(h)}

    torch.manual_seed(0)
    first = small(Net, ["w"])
    base = first.model()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(-0.7)
    second = Case(base, {"a": first.folders["b"], "b": first.folders["a"]})
    cases, inputs = (first, second), {"x": torch.randn(3, 4, 6)}
    models = [attached(case) for case in cases]
    calls = [compiled(model) for model in models]
    for names in (["a", None, "b"], ["b", None, "b"]):
        for call, model, case in zip(calls, models, cases, strict=True):
            check(call, model, case, names, inputs)
            check_base(call, case, inputs)
    with torch.no_grad(), lorafx.adapters(models[0], "a"), lorafx.adapters(models[1], "b"):
        got = [call(**inputs)["logits"] for call in calls]
    for logits, case, name in zip(got, cases, "ab", strict=True):
        assert error(logits, case.expected([name] * 3, inputs)) <= 1e-5


def test_threads(plain: Case) -> None:
    """Blocks hold for their threads; a call outside of any is the base's meanwhile."""
    torch.manual_seed(0)
    model, inputs = attached(plain), feed(3, 4)
    call = compiled(model)
    mixes = (["a0", None, "a1"], ["a3", "a3", None], None)
    wanted = [plain.expected(names or [None] * 3, inputs) for names in mixes]
    check(call, model, plain, mixes[0], inputs)  # type: ignore[arg-type]
    errors: list[float] = []

    @torch.no_grad()
    def serve(index: int) -> None:
        for _ in range(10):
            names = mixes[index]
            got = served(call, model, names, inputs) if names else call(**inputs)["logits"]
            errors.append(error(got, wanted[index]))

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 30
    assert max(errors) <= 1e-5


def test_tasks_of_asyncio_may_await_inside_a_block(plain: Case) -> None:
    model, inputs = attached(plain), feed(2, 4)
    call = compiled(model)

    async def calls() -> Tensor:
        with torch.no_grad():
            await asyncio.sleep(0)
            logits: Tensor = call(**inputs)["logits"]
            return logits

    async def inside(*names: str | None) -> None:
        with lorafx.adapters(model, names):
            got = await calls()
            assert torch.equal(got, await asyncio.create_task(calls()))
        assert error(got, plain.expected(names, inputs)) <= 1e-5

    async def all_at_once() -> None:
        base, *_ = await asyncio.gather(calls(), inside("a0", None), inside("a1", "a2"))
        assert torch.equal(base, plain.base(**inputs)["logits"])

    asyncio.run(all_at_once())


@pytest.mark.parametrize("backend", ["lorafx", "eager"])
def test_a_part_that_is_called_by_itself_is_refused_where_adapters_change_it(
    plain: Case, backend: str
) -> None:
    model, x = attached(plain), torch.randn(2, 3, plain.base.up.in_features)
    part = torch.compile(model.up, backend=backend)
    with torch.no_grad():
        base = part(x)
    for call in (model.up, part, part):
        message = pytest.raises(lorafx.MatchError, match="outside the compiled model's own calls")
        with torch.no_grad(), message, lorafx.adapters(model, "a0"):
            call(x)
    assert torch.equal(part(x), base)
    check(model, model, plain, ["a0", None, "a1"], feed(3, 5))


@pytest.mark.slow
def test_it_is_explained_and_measured(plain: Case) -> None:
    model, inputs, names = attached(plain), feed(4, 5), ["a1", None, "a3", "a0"]
    call, cm = compiled(model), plain.compile()
    check(call, model, plain, names, inputs)
    assert "graphs: 1" in str(lorafx.explain(call))
    want = cm.why("embed", adapter="a3", inputs=inputs)
    for given in (model, call):
        found = lorafx.why(given, "embed", "a3", inputs=inputs)
        assert (found.adapter, found.rule, found.sizes) == (want.adapter, want.rule, want.sizes)
    assert found.graphs[0].lora
    report, other = (lorafx.profile(m, inputs, names, calls=2) for m in (call, cm))
    assert [node.paths for node in report.nodes] == [node.paths for node in other.nodes]
    profiled = partial(lorafx.profile, inputs=inputs, adapter_names=names)
    for look in (partial(lorafx.why, path="up"), profiled):
        with pytest.raises(ConfigError, match=r"carries no LoRA; call lorafx\.attach"):
            look(plain.base)
    with pytest.raises(ConfigError):
        lorafx.why("folder", "up")  # type: ignore[arg-type]


def test_a_peft_model_gives_its_adapters(plain: Case) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.PeftModel.from_pretrained(plain.model(), plain.folders["a0"], "x")
    model, inputs = lorafx.attach(wrapped, options=REFERENCE), feed(2, 4)
    for call in (model, compiled(model)):
        got = served(call, model, ["x", None], inputs)
        assert error(got, plain.expected(["a0", None], inputs)) <= 1e-5
    with lorafx.adapters(wrapped, "x"), torch.no_grad():
        assert error(model(**inputs)["logits"], plain.expected(["a0"] * 2, inputs)) <= 1e-5
    lorafx.detach(model)
    with torch.no_grad():
        assert error(wrapped(**inputs)["logits"], plain.expected(["a0"] * 2, inputs)) <= 1e-5


@pytest.mark.usefixtures("earlier_objects_frozen")
def test_nothing_keeps_a_model_alive(plain: Case) -> None:
    model, inputs = attached(plain), feed(2, 4)
    call = compiled(model)
    check_base(call, plain, inputs)
    check(call, model, plain, ["a0", None], inputs)
    seen = weakref.ref(model)
    del model, call
    gc.collect()
    assert seen() is None
