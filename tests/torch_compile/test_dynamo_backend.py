"""`torch.compile(model, backend="lorafx")` on a marked model; `lorafx.adapters` gives the rows."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch._dynamo
from attached import attached, check, check_base, compiled, fresh_dynamo, graphs, served
from dense_merge import TOLERANCE, error, save_adapter
from tiny_models import FAMILIES, token_inputs
from torch import nn
from torch._dynamo.utils import counters

import lorafx
from lorafx.errors import (
    BatchError,
    CaptureError,
    CheckpointError,
    ConfigError,
    ProvenanceError,
    UnknownAdapterError,
)
from lorafx.torch_compile.attached import marked_session

__all__ = ["fresh_dynamo"]
feed = FAMILIES["plain"].inputs


def test_mixes_sizes_and_the_base_on_two_graphs(plain):
    torch.manual_seed(0)
    model = attached(plain)
    call = compiled(model, fullgraph=True)
    check_base(call, plain, feed(3, 5))
    check(call, model, plain, ["a0", None, "a1"], feed(3, 5))
    captured, seen = graphs(model), counters["stats"]["unique_graphs"]
    check(call, call, plain, ["a2", "a3", "a2", "a4"], feed(4, 9))
    check(call, model, plain, ["a4", "__base__"], feed(2, 3))
    check(call, model, plain, ["a1"] * 70, feed(70, 2))
    check(call, model, plain, ["a0", None, "a1", "a3", "a2"], feed(5, 5))
    check(call, model, plain, ["a0", None, "a1", "a3", "a2"], feed(5, 7))
    check_base(call, plain, feed(6, 4))
    assert graphs(model) == captured == 2
    assert counters["stats"]["unique_graphs"] == seen


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_a_transformers_model_is_one_graph(shallow, dynamic):
    torch.manual_seed(0)
    model = attached(shallow)
    call = compiled(model, fullgraph=True, dynamic=dynamic)
    check(call, model, shallow, ["a0", None, "a1"], token_inputs(3, 3))
    check(call, model, shallow, ["a2", "a3", "a1"], token_inputs(3, 3))
    assert graphs(model) == 1
    check(call, model, shallow, ["a3", "a2"], token_inputs(2, 5))
    check(call, model, shallow, ["a0", "a2", "a1", None], token_inputs(4, 6))
    assert graphs(model) == {None: 2, False: 3, True: 1}[dynamic]


def test_equal_batch_and_length_are_two_symbols(plain):
    """Duck shaping would make (5, 5) one symbol, and Dynamo's default is to do so."""
    torch.manual_seed(0)
    model = attached(plain)
    call, names = compiled(model), ["a0", None, "a1", "a3", "a2"]
    check(call, model, plain, names, feed(5, 5))
    check(call, model, plain, names, feed(5, 7))
    check(call, model, plain, names[:4], feed(4, 5))
    assert graphs(model) == 1
    assert torch.fx.experimental._config.use_duck_shape


def test_blocks(plain):
    torch.manual_seed(0)
    model, inputs = attached(plain), feed(2, 4)
    call = compiled(model, dynamic=False)
    want = {name: plain.expected([name] * 2, inputs) for name in ("a0", "a1")}
    with torch.no_grad(), lorafx.adapters(model, "a0"):
        assert error(call(**inputs)["logits"], want["a0"]) <= 1e-5
        with lorafx.adapters(call, ["a1", "a1"]):
            assert error(call(**inputs)["logits"], want["a1"]) <= 1e-5
            with lorafx.adapters(model, None):
                check_base(call, plain, inputs)
        with pytest.raises(RuntimeError, match="of the caller"), lorafx.adapters(model, "a1"):
            raise RuntimeError("of the caller")
        with pytest.raises(UnknownAdapterError, match="no adapter named 'a9'; nearest: a"):
            lorafx.adapters(model, ["a1", "a9"]).__enter__()
        assert error(call(**inputs)["logits"], want["a0"]) <= 1e-5
    check_base(call, plain, inputs)
    check_base(model, plain, inputs)


def test_more_adapters_than_slots_in_nested_blocks(plain):
    """The inner block takes the outer one's slot, which has to get its adapter back."""
    torch.manual_seed(0)
    config = lorafx.LoraConfig(max_adapters=1)
    model = lorafx.attach(
        plain.model(), config, adapters=plain.folders, options={"lowering": "reference"}
    )
    call, inputs = compiled(model, dynamic=False), feed(2, 4)
    with torch.no_grad(), lorafx.adapters(model, ["a0", None]):
        check(call, model, plain, ["a3", "a3"], inputs)
        got = call(**inputs)["logits"]
    assert error(got, plain.expected(["a0", None], inputs)) <= 1e-5
    with pytest.raises(lorafx.CapacityError, match="2 distinct adapters"):
        served(call, model, ["a0", "a1"], inputs)
    check_base(call, plain, inputs)


def test_names_that_do_not_fit_the_batch(plain):
    model = attached(plain)
    call = compiled(model)
    with pytest.raises(BatchError, match="adapter_names has 2 entries, but the batch has 4 rows"):
        served(call, model, ["a0", "a1"], feed(4, 3))
    with pytest.raises(BatchError, match="adapter_names has 2 entries, but the batch has 1 rows"):
        served(call, model, ["a0", "a1"], feed(1, 3))
    with pytest.raises(ConfigError, match="adapter_names must be a list"):
        served(call, model, 7, feed(1, 3))  # type: ignore[arg-type]
    with pytest.raises(BatchError, match="adapter_names is empty"):
        served(call, model, [], feed(1, 3))
    check(call, model, plain, ["a0", "a1"], feed(2, 3))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(6, 9)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.w(x) + shift.sum()}


def test_arguments_with_other_rows_than_the_batch(small):
    case = small(TwoInputs, ["w"])
    model = attached(case)
    call, x = compiled(model), torch.randn(3, 2, 6)
    with pytest.raises(BatchError, match=r"L\['shift'\]\" has shape \(2, 4\)"):
        served(call, model, ["a", None, "b"], {"x": x, "shift": torch.zeros(2, 4)})
    served(call, model, ["a", None, "b"], {"x": x, "shift": torch.zeros(1, 4)})


def test_of_a_cache_the_rows_are_looked_at_once(shallow):
    """Each layer has two tensors in it, with as many rows as the rest by Dynamo's guards."""
    torch.manual_seed(0)
    model, names = attached(shallow), ["a0", None, "a1"]
    call = compiled(model, fullgraph=True)
    tokens = torch.randint(0, model.config.vocab_size, (3, 6))
    with torch.no_grad(), lorafx.adapters(model, names):
        cache = call(input_ids=tokens[:, :4], use_cache=True).past_key_values
        steps = [
            call(input_ids=tokens[:, at : at + 1], past_key_values=cache).logits for at in (4, 5)
        ]
    want = shallow.expected(names, {"input_ids": tokens})
    assert error(torch.cat(steps, 1), want[:, 4:]) <= TOLERANCE
    step = marked_session(model).backend.records[-1].checks.places
    assert [name for _, _, name in step.called] == ["L['kwargs']['input_ids']"]
    with (
        torch.no_grad(),
        lorafx.adapters(model, names[:2]),
        pytest.raises(BatchError, match="adapter_names has 2 entries, but the batch has 3 rows"),
    ):
        call(input_ids=tokens[:, 5:], past_key_values=cache)


def test_gradients_are_refused_with_adapters_and_the_base_trains(plain):
    torch.manual_seed(0)
    model, inputs = attached(plain).requires_grad_(True), feed(2, 4)
    call, twin = compiled(model, dynamic=False), plain.model().requires_grad_(True)
    with (
        pytest.raises(CaptureError, match=r"torch\.no_grad\(\) or torch\.inference_mode\(\)"),
        lorafx.adapters(model, ["a0", "a1"]),
    ):
        call(**inputs)
    for one in (call, twin):
        one(**inputs)["logits"].square().mean().backward()
    own, want = dict(model.named_parameters()), dict(twin.named_parameters())
    assert all(torch.equal(own[name].grad, want[name].grad) for name in want)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            check(call, model, plain, ["a0", None], inputs)


def test_without_a_compiler_or_with_another_one(plain):
    """Only proved rows may mix: neither eager mode nor a foreign backend proves them."""
    model, inputs = attached(plain), feed(2, 4)
    check(model, model, plain, ["a1", "a1"], inputs)
    with pytest.raises(ProvenanceError, match="eager mode does not know"):
        served(model, model, ["a1", None], inputs)
    foreign = torch.compile(model, backend="aot_eager")
    check(foreign, model, plain, ["a1", "a1"], inputs)
    with pytest.raises(ProvenanceError, match="a mixed batch reached a site"):
        served(foreign, model, ["a1", None], inputs)


def test_adapters_come_and_go(plain, tmp_path):
    torch.manual_seed(0)
    model = attached(plain)
    call, inputs = compiled(model, dynamic=False), feed(2, 4)
    check(call, model, plain, ["a0", "a1"], inputs)
    captured = graphs(model)
    folder = save_adapter(plain.base, tmp_path / "new", rank=4, targets=["up", "down"], seed=9)
    lorafx.load_adapter(model, folder, "new")
    got, base = served(call, model, ["new", None], inputs), plain.expected([None] * 2, inputs)
    assert error(got[:1], base[:1]) > 1e-3
    assert error(got[1:], base[1:]) <= 1e-5
    with pytest.raises(CheckpointError, match="adapter_config"):
        lorafx.load_adapter(model, tmp_path, "none")
    with pytest.raises(BatchError, match="'new' is being served"), lorafx.adapters(call, "new"):
        lorafx.unload_adapter(model, "new")
    kept = weakref.ref(marked_session(model).store["new"])
    lorafx.unload_adapter(call, "new")
    gc.collect()
    assert kept() is None
    with pytest.raises(UnknownAdapterError):
        served(call, model, ["new", None], inputs)
    assert graphs(model) == captured


def test_detached_and_attached_again(plain):
    model, inputs = attached(plain), feed(2, 4)
    call = compiled(model, dynamic=False)
    check(call, model, plain, ["a0", "a1"], inputs)
    with pytest.raises(CaptureError, match="not inside"), lorafx.adapters(model, "a0"):
        lorafx.detach(model)
    assert lorafx.detach(call) is model
    check_base(call, plain, inputs)
    with pytest.raises(ConfigError, match="carries no LoRA"):
        lorafx.unload_adapter(model, "a0")
    torch._dynamo.reset()  # of the graph without LoRA that was captured in between
    lorafx.attach(model, {"other": plain.folders["a2"]}, options={"lowering": "reference"})
    got = served(call, model, ["other", None], inputs)
    assert error(got, plain.expected(["a2", None], inputs)) <= 1e-5


def test_a_copy_that_is_made_inside_a_block_is_the_base(plain):
    model, inputs = attached(plain), feed(2, 4)
    for names in ("a0", ["a0", None]):
        with lorafx.adapters(model, names):
            twin = copy.deepcopy(model)
        check_base(twin, plain, inputs)


def test_models_that_cannot_be_attached_or_served(plain):
    model = attached(plain)
    with pytest.raises(CaptureError, match="already carries a LoRA mark"):
        lorafx.attach(model, plain.folders)
    with pytest.raises(CaptureError, match=r"wrapped by torch\.compile"):
        lorafx.attach(compiled(plain.model()), plain.folders)
    outer = nn.ModuleDict({"inner": model})
    with pytest.raises(ConfigError, match="is part of, a model that LoRA was attached to"):
        lorafx.adapters(outer, "a0").__enter__()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ConfigError, match="carries marks of another model"):
            lorafx.adapters(copied, "a0").__enter__()
        lorafx.detach(copied)
        lorafx.attach(copied, plain.folders, options={"lowering": "reference"})
        check(compiled(copied, dynamic=False), copied, plain, ["a0", None], feed(2, 3))


def test_a_graph_captured_before_attaching_is_no_silent_no_op(plain):
    model, inputs = plain.model(), feed(2, 4)
    call = torch.compile(model, backend="lorafx", options={"lowering": "reference"})
    check_base(call, plain, inputs)
    lorafx.attach(model, plain.folders, options={"lowering": "reference"})
    with pytest.raises(CaptureError, match="captured before LoRA was attached"):
        served(call, model, ["a0", None], inputs)
    check_base(call, plain, inputs)
    torch._dynamo.reset()
    check(call, model, plain, ["a0", None], inputs)


def test_options_of_torch_compile(plain):
    model, inputs = attached(plain), feed(2, 4)
    call = compiled(model, options={"lowering": "reference"}, dynamic=False)
    check(call, model, plain, ["a0", None], inputs)
    for options, message in (
        ({"verify": "off"}, "verify='off', but the model was attached with verify='lint'"),
        ({"lowring": "reference"}, "unknown option 'lowring'; nearest: lowering"),
        ({"lora_config": plain.folders}, "carries LoRA already"),
        ({"passes": {"pak": False}}, "unknown pass 'pak'; nearest: pack"),
    ):
        with pytest.raises(ConfigError, match=message):
            compiled(model, options=options)(**inputs)
    with pytest.raises(ConfigError, match="unknown pass 'pak'"):  # also where there is no LoRA
        compiled(plain.model(), options={"passes": {"pak": False}})(**inputs)


def test_changed_weights(plain):
    """Packed weights that were split are packed again; what cannot be is refused."""
    model, inputs = attached(plain), feed(2, 4)
    call = compiled(model, dynamic=False)
    check(call, model, plain, ["a0", "a1"], inputs)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    check(call, model, plain, ["a0", "a1"], inputs)
    model.double()
    with pytest.raises(CaptureError, match="have changed shape, dtype, device or format"):
        served(call, model, ["a0", "a1"], inputs)


@pytest.mark.slow
def test_generate_with_beams(shallow):
    """The forward alone is compiled; beams repeat rows, and greedy decoding does not."""
    torch.manual_seed(0)
    model, inputs, names = attached(shallow), token_inputs(3, 6), ["a1", None, "a0"]
    model.forward = compiled(model.forward)
    fixed = {"pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 3, "do_sample": False}
    for beams in (1, 3):
        with lorafx.adapters(model, names):
            got = model.generate(**inputs, **fixed, num_beams=beams, disable_compile=True)
        captured = graphs(model)
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            alone = shallow.alone(name).generate(**one, **fixed, num_beams=beams)
            assert torch.equal(got[row], alone[0])
        with lorafx.adapters(model, ["a3", "a2", None]):
            model.generate(**inputs, **fixed, num_beams=beams, disable_compile=True)
        assert graphs(model) == captured
    with pytest.raises(BatchError, match="adapter_names has 3 entries, but the batch has 6 rows"):
        served(model, model, names, token_inputs(6, 4))


@torch._dynamo.config.patch(recompile_limit=2)
def test_too_many_graphs_are_an_error_not_silent_eager(plain):
    model = attached(plain, {"recompile_limit": 2})
    call = compiled(model, dynamic=False)
    check(call, model, plain, ["a0", None], feed(2, 3))
    check(call, model, plain, ["a0", None], feed(2, 4))
    with pytest.raises(CaptureError, match="PlainModel has as many graphs as Options"):
        served(call, model, ["a0", None], feed(2, 5))
    check(call, model, plain, ["a1", None], feed(2, 4))


def test_a_peft_model_gives_its_adapters(plain):
    peft = pytest.importorskip("peft")
    wrapped = peft.PeftModel.from_pretrained(plain.model(), plain.folders["a0"], "x")
    model = lorafx.attach(wrapped, options={"lowering": "reference"})
    call, inputs = compiled(model, dynamic=False), feed(2, 4)
    got = served(call, model, ["x", None], inputs)
    assert error(got, plain.expected(["a0", None], inputs)) <= 1e-5
    report = str(lorafx.explain(model))
    assert "graphs: 1" in report
    assert "x: rank 2" in report
    lorafx.detach(model)
    with torch.no_grad():
        assert error(wrapped(**inputs)["logits"], plain.expected(["a0"] * 2, inputs)) <= 1e-5


@pytest.mark.usefixtures("earlier_objects_frozen")
def test_graphs_do_not_keep_a_model_alive(plain):
    """Dynamo keeps graphs by code object; what they hold would never be freed."""
    model, inputs = attached(plain), feed(2, 4)
    call = compiled(model, dynamic=False)
    check_base(call, plain, inputs)
    check(call, model, plain, ["a0", None], inputs)
    seen = weakref.ref(model)
    del model, call
    gc.collect()
    assert seen() is None
