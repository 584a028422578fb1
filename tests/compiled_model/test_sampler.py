"""A sampler beside a trainer: whose weights it serves and when, and what the trainer notices."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
import transformers
from dense_merge import REFERENCE, error
from expert_models import moe_base
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorafx
from lorafx.errors import (
    BatchError,
    CapacityError,
    CaptureError,
    CheckpointError,
    ConfigError,
    LorafxWarning,
    ReplacedModuleError,
    UnknownAdapterError,
    UnsupportedAdapterError,
)

LLAMA = {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
INPUTS = {"input_ids": torch.arange(3, 18).reshape(3, 5)}


def classifier() -> nn.Module:
    config = FAMILIES["bert"].build().config
    return transformers.BertForSequenceClassification(config)


#: A base, and the configurations of its two adapters.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "llama": (
        FAMILIES["llama"].build,
        {**LLAMA, "use_dora": True},
        {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    ),
    "experts": (
        lambda: moe_base("qwen3_moe"),
        {
            **{"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
            "lora_dropout": 0.0,
        },
        {"r": 3, "target_modules": ["o_proj"]},
    ),
    "encoder": (
        classifier,
        {"r": 3, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
        {"r": 2, "target_modules": ["dense"], "use_rslora": True},
    ),
}


def trainer(case: str = "llama", *, base: bool = False, **changes: Any) -> peft.PeftModel:
    """A PeftModel in training mode with the adapters "x" and "y", of which "x" is active. Its base
    is trained too if `base`."""
    build, first, second = CASES[case]
    torch.manual_seed(0)
    model = peft.get_peft_model(
        build(**changes),
        peft.LoraConfig(**{"lora_dropout": 0.1, **first}, init_lora_weights=False),
        "x",
    )
    model.add_adapter("y", peft.LoraConfig(**second, init_lora_weights=False))
    if base:
        model.requires_grad_(True)
    return model.train()


def sampler_of(model: nn.Module, **options: Any) -> Any:
    return lorafx.sampler(model, {**REFERENCE, **options})


def trained_of(model: Any) -> dict[str, Tensor]:
    """The parameters of all adapters, by name."""
    marks = ("lora_", "modules_to_save")
    return {n: p for n, p in model.named_parameters() if any(mark in n for mark in marks)}


def step(model: Any, *, of_base: bool, seed: int = 0, size: float = 0.05) -> None:
    """What a step of an optimiser does: each trained parameter is written in place."""
    torch.manual_seed(seed)
    trained = trained_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (name in trained) != of_base and parameter.dim():
                parameter.add_(torch.randn_like(parameter), alpha=size)


@contextmanager
def evaluated(model: Any) -> Any:
    training = model.training
    model.eval()
    with torch.no_grad():
        yield model
    model.train(training)


class Oracle:
    """Copies of the trained model, each with one adapter merged densely into its weights: the
    present ones of the base, and those of the adapter at its last `sync`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.served: dict[str, Tensor] = {}
        self.sync(("x", "y"))

    def sync(self, names: Any) -> None:
        for name, tensor in trained_of(self.model).items():
            if set(names) & set(name.split(".")):
                self.served[name] = tensor.detach().clone()

    def logits(self, name: str | None, ids: Tensor) -> Tensor:
        merged = copy.deepcopy(self.model).eval()
        with torch.no_grad():
            for key, parameter in trained_of(merged).items():
                parameter.copy_(self.served[key])
            if name is None:
                with merged.disable_adapter():
                    return merged(input_ids=ids).logits
            merged.set_adapter(name)
            return merged.merge_and_unload(adapter_names=[name])(input_ids=ids).logits

    def check(self, sampler: Any, names: list[str | None]) -> None:
        got = sampler(**INPUTS, adapter_names=names).logits
        for row, name in enumerate(names):
            want = self.logits(name, INPUTS["input_ids"][row : row + 1])
            assert error(got[row : row + 1], want) <= 1e-5, name


# --- what is served ---
@pytest.mark.usefixtures("road")
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "llama")) for c in CASES]
)
def test_any_order_of_steps_syncs_and_calls(case):
    depth = {"num_hidden_layers": 2} if case == "llama" else {}
    model = trainer(case, base=True, **depth)
    sampler, oracle = sampler_of(model), Oracle(model)
    oracle.check(sampler, ["x", None, "y"])
    oracle.check(sampler, [None] * 3)
    compiled = sampler.recompiles
    names = st.lists(st.sampled_from(["x", "y", None]), min_size=3, max_size=3)
    steps = st.sampled_from([("step", False), ("step", True), ("sync", ["x"]), ("sync", None)])

    @settings(max_examples=4)
    @given(st.lists(steps | st.tuples(st.just("call"), names), min_size=2, max_size=7), names)
    def check(orders: Any, last: Any) -> None:
        for seed, (order, what) in enumerate([*orders, ("call", last)]):
            if order == "step":
                step(model, of_base=what, seed=seed)
            elif order == "sync":
                before = sampler.adapter_versions
                after = sampler.sync(what)
                oracle.sync(what or ("x", "y"))
                assert {n for n in after if after[n] > before[n]} == set(what or ("x", "y"))
            else:
                oracle.check(sampler, what)

    check()
    assert sampler.recompiles == compiled
    assert model.training
    assert not sampler.training


def test_the_first_adapter_is_the_default_until_another_is_chosen(in_eager_mode):
    model = trainer()
    sampler, oracle = sampler_of(model), Oracle(model)
    assert sampler.active_adapter == "x"
    assert isinstance(sampler, lorafx.Sampler | lorafx.CompiledModel)
    got = sampler(**INPUTS).logits
    assert error(got[:1], oracle.logits("x", INPUTS["input_ids"][:1])) <= 1e-5
    with evaluated(model):
        want = model(**INPUTS).logits
        assert error(got, want) <= 1e-5
        tokens = sampler.generate(**INPUTS, max_new_tokens=2, do_sample=False)
        assert torch.equal(tokens, model.generate(**INPUTS, max_new_tokens=2, do_sample=False))


def test_adapters_that_come_and_go(in_eager_mode):
    model = trainer()
    sampler = sampler_of(model)
    model.add_adapter("z", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert "z" in sampler.sync()
    model.set_adapter("z")
    with evaluated(model):
        assert (
            error(sampler(**INPUTS, adapter_names=["z"] * 3).logits, model(**INPUTS).logits) <= 1e-5
        )
    model.set_adapter("x")
    model.delete_adapter("z")
    assert set(sampler.sync()) == {"x", "y"}
    with pytest.raises(UnknownAdapterError, match="has no adapter 'z'; it has x, y"):
        sampler.sync(["z"])


def test_a_default_that_the_trainer_deletes_is_said():
    model = trainer()
    sampler = sampler_of(model)
    model.set_adapter("y")
    model.delete_adapter("x")
    with pytest.warns(LorafxWarning, match="'x' was deleted .* are the base's from now on"):
        sampler.sync()
    assert sampler.active_adapter is None


@pytest.mark.usefixtures("road")
def test_a_hook_that_comes_later_runs_in_the_sampler_too():
    model = trainer()
    sampler = sampler_of(model)
    before = sampler(**INPUTS).logits
    mlp = model.get_base_model().model.layers[0].mlp
    handle = mlp.register_forward_hook(lambda module, args, output: 2 * output)
    with evaluated(model):
        assert error(sampler(**INPUTS).logits, model(**INPUTS).logits) <= 1e-5
    handle.remove()
    assert torch.equal(sampler(**INPUTS).logits, before)


def test_forwards_that_a_trainer_has_put_in_their_places_run_the_copy():
    model = trainer()
    base = model.get_base_model()
    forward, mlp = base.forward, base.model.layers[0].mlp
    ran: list[nn.Module] = []

    @functools.wraps(type(base).forward)
    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)  # as TRL and accelerate call the one before
        ran.extend((self, forward.__self__))
        output.logits = 2 * output.logits
        return output

    def tripled(module: Any, x: Tensor, *, factor: int = 3) -> Tensor:
        ran.extend((module, mlp))
        return module.down_proj(factor * mlp.act_fn(mlp.gate_proj(x)))

    base.forward = types.MethodType(doubled, base)
    mlp.forward = functools.partial(tripled, mlp)
    sampler = sampler_of(model)
    for _ in range(2):
        sampler.sync()
        got = sampler(**INPUTS).logits
        assert ran
        assert not {id(module) for module in ran} & {id(base), id(mlp)}
        with evaluated(model):
            assert error(got, model(**INPUTS).logits) <= 1e-5
        ran.clear()
        step(model, of_base=False)
    assert base.forward.__func__ is doubled
    assert mlp.forward.args == (mlp,)


# --- what the trainer notices ---
@pytest.mark.parametrize("start", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_training_is_the_same_bit_for_bit(start):
    """Beside a sampler that answers eagerly, and beside graphs where checkpoints are on."""

    def losses(*, sampled: bool, checkpoints: bool) -> tuple[list[Tensor], list[Tensor]]:
        model = trainer(base=True)
        if checkpoints:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        begin = "compiled" if checkpoints else start
        sampler = sampler_of(model, start=begin) if sampled else None
        optimizer, found = torch.optim.AdamW(model.parameters(), 1e-2), []
        for seed in range(3):
            if sampler is not None:
                sampler.sync()
                sampler(**INPUTS, adapter_names=["x", None, "y"])
                sampler.generate(**INPUTS, max_new_tokens=2)
            torch.manual_seed(seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=seed == 2):
                loss = model(**INPUTS, labels=INPUTS["input_ids"]).loss
            loss.backward()
            found += [
                loss.detach(),
                *(p.grad.clone() for p in model.parameters() if p.grad is not None),
            ]
            optimizer.step()
            optimizer.zero_grad()
        return found, list(model.parameters())

    for checkpoints in (False, True):
        with_sampler, without = (losses(sampled=s, checkpoints=checkpoints) for s in (True, False))
        for got, want in zip(with_sampler, without, strict=True):
            assert len(got) == len(want) > 10
            assert all(map(torch.equal, got, want))


class Made(TorchDispatchMode):
    """Keeps weak references to new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._tensors += [weakref.ref(t) for t in tree_leaves(output) if isinstance(t, Tensor)]
        return output

    def alive(self) -> dict[int, int]:
        """The bytes of each memory that is still in use."""
        tensors = (reference() for reference in self._tensors)
        return {t.untyped_storage().data_ptr(): t.nbytes for t in tensors if t is not None}


def test_there_is_no_second_copy_of_the_base():
    model = trainer(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = sum(p.nbytes for p in model.get_base_model().parameters())
    with Made() as made:
        sampler = sampler_of(model)
    sampler(**INPUTS, adapter_names=["x", None, None])
    assert {p.untyped_storage().data_ptr() for p in sampler._orig_mod.parameters()} <= own
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == own
    new = sum(size for address, size in made.alive().items() if address not in own)
    memory = sampler.memory()
    assert memory["banks"] <= new < memory["banks"] + memory["host"] + 0.03 * weights


# --- continuous batching ---

PAGES = transformers.ContinuousBatchingConfig(page_size=8, num_blocks=16)


def test_requests_under_way_keep_their_version_and_later_ones_have_the_new_one(in_eager_mode):
    model = trainer()
    sampler, oracle = lorafx.sampler(model, REFERENCE), Oracle(model)
    prompt = list(range(3, 20))
    with sampler.continuous_batching(continuous_batching_config=PAGES) as engine:

        def added(name: str | None) -> str:
            return engine.add_request(
                prompt, adapter=name, max_new_tokens=6, ignore_eos=True, logprobs=0, streaming=True
            )

        def check(ids: list[str], **oracles: Oracle) -> None:
            outputs = engine.collected(ids)
            for (label, oracle), output in zip(oracles.items(), outputs.values(), strict=True):
                tokens = torch.tensor([[*prompt, *output.generated_tokens]])
                logits = oracle.logits({"base": None}.get(label, label), tokens)[0, 16:-1]
                want = logits.log_softmax(-1).gather(1, tokens[0, 17:, None])[:, 0]
                got = torch.tensor([token.logprob for token in output.token_logprobs])
                assert len(got) == 6
                assert error(got, want) <= 1e-5

        for _ in range(2):
            earlier = copy.copy(oracle)
            earlier.served = dict(oracle.served)
            first = [added("x"), added("y"), added(None)]
            next(output for output in engine if output.generated_tokens)  # it has begun
            step(model, of_base=False)
            sampler.sync()
            oracle.sync(("x", "y"))
            second = [added("x"), added("y"), added(None)]
            check(first, x=earlier, y=earlier, base=earlier)
            check(second, x=oracle, y=oracle, base=oracle)
        step(model, of_base=True)  # blocks of the old weights are not found again
        check([added("x"), added(None)], x=oracle, base=oracle)


def new_logprobs(model: Any, prompt: list[int], tokens: list[int]) -> Tensor:
    """Those of `tokens` by the model's forward."""
    ids = torch.tensor([prompt + tokens])
    with evaluated(model):
        logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def logprob_errors(dtype: torch.dtype) -> tuple[float, float]:
    """The largest errors of log-probabilities that a sampler tells, and of those of the trainer's
    own forward: against the latter in float32."""
    model = trainer(hidden_size=64).to(dtype)
    generation = transformers.GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1)
    prompts, sampler = [[3, 4, 5], [6, 7], [8, 9, 10, 11]], lorafx.sampler(model, REFERENCE)
    torch.manual_seed(0)
    outputs = sampler.generate_batch(
        prompts, ["x"] * 3, generation, PAGES, max_new_tokens=12, return_logprobs=True
    )
    exact, errors = copy.deepcopy(model).float(), torch.zeros(2)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        tokens, drawn = output.generated_tokens, torch.tensor(output.logprobs)
        told = torch.tensor([token.logprob for token in output.token_logprobs])
        assert len(drawn) == 12
        assert error(drawn, told) <= 1e-5  # nothing is between them
        want = new_logprobs(exact, prompt, tokens)
        found = (told - want, new_logprobs(model, prompt, tokens) - want)
        errors = errors.maximum(torch.stack([e.abs().max() for e in found]))
    return float(errors[0]), float(errors[1])


def test_logprobs_of_sampled_tokens_are_those_of_the_trainer_s_forward(in_eager_mode):
    assert logprob_errors(torch.float32)[0] <= 1e-5
    sampled, own = logprob_errors(torch.bfloat16)
    assert own > 1e-4
    assert sampled <= 2 * own


# --- what is refused, and served ---
def test_adapters_merged_by_the_trainer_are_refused_until_they_are_out_again(in_eager_mode):
    model = trainer()
    sampler = sampler_of(model)
    before = sampler(**INPUTS).logits
    model.merge_adapter(["x"])
    for use in (lambda: sampler(**INPUTS, adapter_names=[None] * 3), sampler.sync):
        with pytest.raises(CheckpointError, match=r"x are merged .* peft_model.unmerge_adapter"):
            use()
    with pytest.raises(CheckpointError, match="x are merged"):
        lorafx.sampler(model)
    model.unmerge_adapter()
    assert error(sampler(**INPUTS).logits, before) <= 1e-5
    model.merge_and_unload()
    with pytest.raises(CheckpointError, match="x are merged"):
        sampler(**INPUTS)


def test_parameters_that_take_the_place_of_others_are_served():
    model = trainer()
    sampler, oracle = sampler_of(model), Oracle(model)
    oracle.check(sampler, ["x", None, "y"])
    layer = model.get_base_model().model.layers[0]
    up, q = layer.mlp.up_proj, layer.self_attn.q_proj.base_layer
    up.weight = nn.Parameter(torch.randn_like(up.weight), requires_grad=False)
    q.weight.data = torch.randn_like(q.weight)  # of which x has DoRA's norms
    oracle.check(sampler, ["x", None, "y"])
    lora = layer.self_attn.q_proj.lora_A["x"]
    lora.weight = nn.Parameter(torch.randn_like(lora.weight))
    layer.self_attn.v_proj.set_scale("x", 3.0)
    sampler.sync()
    oracle.sync("xy")
    oracle.check(sampler, ["x", None, "y"])
    assert sampler.recompiles == 1


@pytest.fixture
def process_group() -> Any:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_sharded_parameters_are_refused(process_group):
    model = trainer()
    sampler = sampler_of(model)
    sampler(**INPUTS)
    layer = model.get_base_model().model.layers[0]
    torch.distributed.fsdp.fully_shard(layer)
    with pytest.raises(CaptureError, match=r"has become a DTensor .* \(gather what is sharded"):
        sampler(**INPUTS)
    with pytest.raises(CaptureError, match=r"is sharded \(a DTensor .*load_weights"):
        lorafx.sampler(model)


def replaced_module(model: Any) -> None:
    model.get_base_model().model.norm = nn.Identity()


def other_forward(model: Any) -> None:
    norm = model.get_base_model().model.norm
    norm.forward = types.MethodType(lambda self, x: x * self.weight, norm)


def other_shape(model: Any) -> None:
    model.get_base_model().model.norm.weight.data = torch.ones(5)


def other_dtype(model: Any) -> None:
    model.get_base_model().model.norm.bfloat16()


def no_parameter(model: Any) -> None:
    model.get_base_model().model.norm.weight = None


@pytest.fixture(scope="module")
def sampled():
    """For what is undone."""
    model = trainer()
    return model, sampler_of(model)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (replaced_module, ReplacedModuleError, r"model\.norm, of a LlamaRMSNorm, was replaced"),
        (other_forward, ReplacedModuleError, r"norm\.forward, of a LlamaRMSNorm, was replaced"),
        (other_shape, CaptureError, r"model\.norm\.weight has become .* shape \(5,\)"),
        (other_dtype, CaptureError, r"norm\.weight has become .* torch.bfloat16"),
        (no_parameter, CaptureError, r"norm\.weight has become nothing"),
    ],
)
def test_a_base_that_graphs_do_not_fit_is_refused(sampled, change, kind, message):
    model, sampler = sampled
    norm, weight = model.get_base_model().model.norm, model.get_base_model().model.norm.weight
    data, before = weight.data, sampler(**INPUTS).logits
    change(model)
    for use in (lambda: sampler(**INPUTS), sampler.sync):
        with pytest.raises(kind, match=message):
            use()
    model.get_base_model().model.norm, norm.weight = norm, weight
    weight.data = data
    vars(norm).pop("forward", None)
    assert torch.equal(sampler(**INPUTS).logits, before)


def test_models_that_cannot_be_sampled_from_are_refused_and_unchanged():
    model = trainer()
    layer = model.get_base_model().model.layers[0]
    state = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    layer.lock = open(__file__)  # noqa: SIM115
    with pytest.raises(CaptureError, match="cannot be copied without its tensors"):
        lorafx.sampler(model)
    layer.lock.close()
    del layer.lock
    with pytest.raises(ConfigError, match="max_rank"):
        lorafx.sampler(model, lora_config=lorafx.LoraConfig(max_rank=0))
    with pytest.raises(CheckpointError, match="holds no LoRA"):
        lorafx.sampler(FAMILIES["llama"].build())
    hada = peft.get_peft_model(
        FAMILIES["llama"].build(), peft.LoHaConfig(target_modules=["q_proj"])
    )
    with pytest.raises(UnsupportedAdapterError, match="LOHA"):
        lorafx.sampler(hada)
    assert state == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    assert not any(module._forward_hooks for module in model.modules())
    cm = lorafx.compile(model, options=REFERENCE)
    with pytest.raises(CaptureError, match="already compiled"):
        lorafx.sampler(model)
    cm.detach()


def test_an_adapter_that_does_not_fit_leaves_all_as_they_were(in_eager_mode):
    model = trainer()
    sampler = sampler_of(model)
    before, versions = sampler(**INPUTS).logits, sampler.adapter_versions
    step(model, of_base=False)
    model.add_adapter("large", peft.LoraConfig(r=64, target_modules=["q_proj"]))
    with pytest.raises(CapacityError, match="64"):
        sampler.sync()
    assert sampler.adapter_versions == versions
    assert torch.equal(sampler(**INPUTS).logits, before)
    sampler.sync(["x", "y"])
    assert sampler.adapter_versions.keys() == versions.keys()


def test_a_sync_within_a_call_that_serves_the_adapter_is_refused():
    model = trainer()
    sampler = sampler_of(model)

    class Syncing(transformers.generation.streamers.BaseStreamer):
        def put(self, value: Tensor) -> None:
            sampler.sync()

        def end(self) -> None: ...

    with pytest.raises(BatchError, match="serves 'x'; replace it when the call has returned"):
        sampler.generate(INPUTS["input_ids"][:1], max_new_tokens=2, streamer=Syncing())


@pytest.mark.parametrize("write", ["merge", "load_weights", "load_state_dict"])
def test_a_sampler_writes_no_weights(write):
    sampler = sampler_of(trainer())
    with pytest.raises(ConfigError, match=rf"{write}\(\) of a sampler would write"):
        getattr(sampler, write)("x")


@pytest.mark.usefixtures("road")
def test_a_sampler_that_has_ended_leaves_the_trainer_as_it_is():
    model = trainer()
    sampler = sampler_of(model)
    assert sampler.detach() is model
    with pytest.raises(CaptureError, match="detached"):
        sampler.sync()
    with evaluated(model):
        want = model(**INPUTS).logits
    first, second = (sampler_of(model)(**INPUTS).logits for _ in range(2))
    assert torch.equal(first, second)
    assert error(first, want) <= 1e-5
