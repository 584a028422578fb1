"""attach: the marked model against dense merge in eager mode, undone without a trace, captured."""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.fx.experimental import _config as shape_config

from lorafx.config import LoraConfig
from lorafx.errors import BatchError, CaptureError, ConfigError, MatchError, ProvenanceError
from lorafx.marks import SiteMark
from lorafx.passes.attach import Attachment, attach_sites, detach
from lorafx.passes.select import build_sites
from lorafx.registry import register, unregister
from lorafx.runtime import Runtime

SLOT = 1
SCALE = 0.5


def attach(model: nn.Module, target=None, **config) -> Attachment:
    lora = LoraConfig(target_modules=target, max_adapters=3, max_rank=4, **config)
    _, sites = build_sites(model, lora)
    return attach_sites(model, sites, lora)


def write_adapter(attachment: Attachment, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random factors of rank 3 at every site, in slot SLOT; ΔW by path, in the weight's layout.

    The rank beyond 3 is filled with NaN, which nothing may read.
    """
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for group in attachment.groups:
        bank, rank = group.bank, 3
        room = bank.B.shape[1]
        bank.A[SLOT] = bank.B[SLOT] = torch.nan
        for index, (site, offset) in enumerate(zip(group.sites, group.offsets, strict=True)):
            a = torch.randn(rank, site.in_features, generator=generator) * 0.3
            b = torch.randn(rank, site.out_features, generator=generator) * 0.3
            if site.eligible.kind == "embedding":
                bank.A[SLOT, :, :rank] = a.T
            else:
                bank.A[SLOT, index * room : index * room + rank] = a
            bank.B[SLOT, :rank, offset : offset + site.out_features] = b
            bank.ranks[SLOT, index] = rank
            bank.scales[SLOT, index] = SCALE
            as_stored = site.eligible.kind == "embedding" or site.eligible.transposed
            deltas[site.path] = SCALE * (a.T @ b if as_stored else b.T @ a)
    return deltas


def merged(model: nn.Module, deltas: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of `model` (before it was marked) with W + ΔW; tied weights part first."""
    model = copy.deepcopy(model)
    for path, delta in deltas.items():
        module = model.get_submodule(path)
        module.weight = nn.Parameter((module.weight + delta).detach())
    return model


def check(model, target, inputs, out=lambda y: y, **config) -> Attachment:
    """Marked eager equals dense merge for one adapter and the base for none; then both again."""
    plain = copy.deepcopy(model)
    attachment = attach(model, target, **config)
    dense = merged(plain, write_adapter(attachment))
    with torch.no_grad():
        base, wanted = out(plain(**inputs)), out(dense(**inputs))
        assert (base - wanted).abs().max() > 1e-2  # the adapter does something
        assert torch.equal(out(model(**inputs)), base)
        attachment.runtime.set_rows([SLOT, SLOT])
        torch.testing.assert_close(out(model(**inputs)), wanted, rtol=1e-5, atol=1e-5)
        attachment.runtime.set_rows([-1, -1])
        assert torch.equal(out(model(**inputs)), base)
        attachment.runtime.set_rows([SLOT, SLOT])
    return attachment


def llama(**changes) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        **changes,
    )
    return transformers.LlamaForCausalLM(config).eval()


IDS = {"input_ids": torch.arange(14).view(2, 7)}
ALL = r".*(_proj|embed_tokens|lm_head)"


def logits(output):
    return output.logits


# Numerics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_llama_equals_dense_merge(tied):
    attachment = check(llama(tie_word_embeddings=tied), ALL, IDS, logits)
    assert len(attachment.marks) == 16


def test_gpt2_equals_dense_merge():
    """Conv1D stores (in, out); the head is tied to the token table; positions are a site too."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    attachment = check(model, ["c_attn", "c_proj", "c_fc", "wte", "wpe", "lm_head"], IDS, logits)
    assert attachment.marks["transformer.h.0.attn.c_attn"].transposed


def test_scaled_embeddings_scale_their_delta():
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=50,
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    attachment = check(model, ["embed_tokens", "q_proj"], IDS, logits)
    assert attachment.marks["model.embed_tokens"].derived


class NumberScaled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


def test_scaled_embedding_by_a_number():
    torch.manual_seed(0)
    check(nn.Sequential(NumberScaled(9, 5)), ["0"], {"input": torch.arange(6).view(2, 3)})


def test_parametrised_weights():
    torch.manual_seed(0)
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)))
    attachment = attach(model)
    deltas = write_adapter(attachment)
    attachment.runtime.set_rows([SLOT])
    x = torch.randn(2, 6)
    wanted = F.linear(x, model[0].weight + deltas["0"], model[0].bias)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x):
        return self.lin(input=x)


def test_input_by_keyword_and_of_any_rank():
    torch.manual_seed(0)
    check(Keyword(), None, {"x": torch.randn(4)})
    check(Keyword(), None, {"x": torch.randn(2, 3, 1, 4)})


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return x @ self.weight


def test_a_registered_class():
    torch.manual_seed(0)
    register(
        Projection,
        in_features=lambda m: m.weight.shape[0],
        out_features=lambda m: m.weight.shape[1],
        transposed=True,
    )
    try:
        attachment = check(nn.Sequential(Projection()), None, {"input": torch.randn(2, 5)})
        assert not attachment.marks["0"].derived
    finally:
        unregister(Projection)


def test_hooks_of_the_user_see_the_delta():
    """For them the model is W + ΔW, whether they were there first or came later."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    seen = []
    model[0].register_forward_hook(lambda m, a, y: seen.append(y))
    attachment = attach(model)
    model[0].register_forward_hook(lambda m, a, y: seen.append(y))
    write_adapter(attachment)
    attachment.runtime.set_rows([SLOT])
    y = model(torch.randn(2, 4))
    assert torch.equal(seen[0], y)
    assert torch.equal(seen[1], y)


# What eager mode cannot do, it says ---------------------------------------------------------


def test_a_mixed_batch_is_refused_in_eager_mode():
    model = llama()
    attachment = attach(model, ["q_proj"])
    write_adapter(attachment)
    attachment.runtime.set_rows([SLOT, -1])
    with (
        torch.no_grad(),
        pytest.raises(
            ProvenanceError,
            match=r"layers\.0\.self_attn\.q_proj: the batch mixes adapters.*compile",
        ),
    ):
        model(**IDS)


class Pair(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.sum()


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x).chunk(2, -1)[0]


class Softmaxed(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class Upcast(nn.Linear):
    """A router in the style of many: the same linear, in another precision."""

    def forward(self, x):
        return F.linear(x.double(), self.weight.double(), self.bias.double()).float()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Pair(4, 4), r"0 \(Pair\): a call with input \(2, 4\) torch.float32 and output tuple"),
        (Halved(4, 4), r"0 \(Halved\): .*output \(2, 2\) .*maps \(…, 4\) to \(…, 4\).*compile"),
        (Softmaxed(4, 4), r"0 \(Softmaxed\): its forward is its own and does not compute x Wᵀ"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_forwards_that_leave_no_place_for_the_delta(module, message):
    model = nn.Sequential(module)
    attachment = attach(model)
    write_adapter(attachment)
    model(torch.randn(2, 4))  # the base model is served as before
    attachment.runtime.set_rows([SLOT, SLOT])
    with pytest.raises(MatchError, match=message):
        model(torch.randn(2, 4))


def test_a_forward_of_its_own_that_computes_the_same():
    torch.manual_seed(0)
    attachment = check(nn.Sequential(Upcast(4, 3)), None, {"input": torch.randn(2, 4)})
    assert attachment.marks["0"].derived


def test_positions_that_shift_their_ids_are_refused():
    """OPT's table takes the attention mask first and adds an offset to its ids."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        word_embed_proj_dim=16,
        max_position_embeddings=16,
    )
    model = transformers.OPTForCausalLM(config).eval()
    attachment = attach(model, ["embed_positions"])
    write_adapter(attachment)
    attachment.runtime.set_rows([SLOT, SLOT])
    mask = torch.ones_like(IDS["input_ids"])
    with (
        torch.no_grad(),
        pytest.raises(MatchError, match=r"embed_positions \(OPTLearned.*W\[ids\]"),
    ):
        model(**IDS, attention_mask=mask)


# The model stays what it was -----------------------------------------------------------------


def test_nothing_but_hooks_changes_and_detach_takes_them_away():
    model = llama()
    names = [(n, type(m), id(m)) for n, m in model.named_modules()]
    state = {k: (v.data_ptr(), v.dtype, v.shape) for k, v in model.state_dict().items()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    attachment = attach(model, ALL)
    assert [(n, type(m), id(m)) for n, m in model.named_modules()] == names
    assert {k: (v.data_ptr(), v.dtype, v.shape) for k, v in model.state_dict().items()} == state
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    attachment.detach()
    attachment.detach()
    assert not any(
        hook for m in model.modules() for hook in (m._forward_hooks, m._forward_hooks_with_kwargs)
    )


def test_detach_leaves_other_hooks():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(lambda *_: None)
    attachment = attach(model)
    attachment.detach()
    assert len(model[0]._forward_hooks) == 1


def test_saved_files_are_the_same(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "before")
    attach(model, ALL)
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()


def _pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    pickle.dump(model, buffer)
    buffer.seek(0)
    return pickle.load(buffer)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copy_is_marked_and_independent(duplicate):
    model = llama()
    attachment = check(model, ALL, IDS, logits)
    with torch.no_grad():
        adapted = model(**IDS).logits
        other = duplicate(model)
        marks = [h for m in other.modules() for h in m._forward_hooks.values()]
        assert len(marks) == len(attachment.marks)
        assert all(isinstance(mark, SiteMark) for mark in marks)
        (runtime,) = {id(mark.runtime): mark.runtime for mark in marks}.values()
        assert len({id(mark.bank) for mark in marks}) == len(attachment.groups)
        attachment.runtime.clear()  # the original's batch is not the copy's
        assert torch.equal(other(**IDS).logits, adapted)
        runtime.clear()
        assert torch.equal(other(**IDS).logits, model(**IDS).logits)
        assert detach(other) == len(marks)
        assert detach(other) == 0
    assert len(model.lm_head._forward_hooks) == 1


def test_marks_make_no_cycles():
    model = nn.Sequential(nn.Linear(2, 2))
    attachment = attach(model)
    gone, runtime = weakref.ref(model), weakref.ref(attachment.runtime)
    del model, attachment
    assert gone() is None
    assert runtime() is None


# Groups ---------------------------------------------------------------------------------------


def test_siblings_share_a_bank():
    attachment = attach(llama(), ALL)
    found = [([s.path.rpartition(".")[2] for s in g.sites], g.offsets) for g in attachment.groups]
    layer = [
        (["q_proj", "k_proj", "v_proj", "o_proj"], (0, 32, 48, 64)),
        (["gate_proj", "up_proj"], (0, 48)),
        (["down_proj"], (0,)),
    ]
    assert found == [(["embed_tokens"], (0,)), *layer, *layer, (["lm_head"], (0,))]
    bank = attachment.groups[1].bank
    assert bank.A.shape == (3, 4 * 4, 32)
    assert bank.B.shape == (3, 4, 96)
    assert attachment.groups[0].bank.A.shape == (3, 50, 4)
    marks = [attachment.marks[s.path] for s in attachment.groups[1].sites]
    assert [m.sibling for m in marks] == [0, 1, 2, 3]
    assert all(m.bank is bank for m in marks)


def test_what_differs_does_not_share():
    model = nn.ModuleDict(
        {
            "a": nn.Linear(4, 4),
            "b": nn.Linear(4, 4).bfloat16(),
            "c": nn.Linear(5, 4),
            "e": nn.Embedding(4, 4),
            "f": nn.Embedding(4, 4),
            "inner": nn.ModuleDict({"a": nn.Linear(4, 4)}),
        }
    )
    attachment = attach(model, r".*[abcef]")
    assert [[s.path for s in g.sites] for g in attachment.groups] == [
        ["a"],
        ["b"],
        ["c"],
        ["e"],
        ["f"],
        ["inner.a"],
    ]
    assert attachment.groups[1].bank.A.dtype == torch.bfloat16
    assert attach(nn.Linear(2, 2), dtype=torch.float16).groups[0].bank.A.dtype == torch.float16


# Refusals -------------------------------------------------------------------------------------


def test_attaching_twice():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    attachment = attach(model, ["1"])
    with pytest.raises(CaptureError, match="1 carries a LoRA mark already; detach"):
        attach(model, ["0"])
    assert not model[0]._forward_hooks
    attachment.detach()
    attach(model, ["0"])


def compiled_call(model):
    model[1].compile(backend="eager")


def compiled_forward(model):
    model[1].forward = torch.compile(model[1].forward, backend="eager")


@pytest.mark.parametrize(
    ("compile_it", "message"),
    [
        (compiled_call, r"1 \(Sequential\) was compiled by module\.compile\(\)"),
        (compiled_forward, r"the forward of 1 \(Sequential\) was compiled by torch\.compile"),
    ],
)
def test_a_model_that_is_compiled_already(compile_it, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.ReLU())
    compile_it(model)
    with pytest.raises(CaptureError, match=message):
        attach(model)
    assert not any(m._forward_hooks for m in model.modules())


def test_the_model_itself_compiled():
    model = nn.Sequential(nn.Linear(2, 2))
    model.compile(backend="eager")
    with pytest.raises(CaptureError, match=r"the model \(Sequential\) was compiled"):
        attach(model)


def test_a_compiled_part_without_sites_does_not_matter():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[1].compile(backend="eager")
    assert list(attach(model).marks) == ["0"]


def test_sites_on_two_devices():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ConfigError, match="the sites lie on cpu, meta"):
        attach(model)
    assert not model[0]._forward_hooks


# Runtime --------------------------------------------------------------------------------------


def test_runtime_rows():
    runtime = Runtime(3, torch.device("cpu"))
    assert not runtime.active
    assert runtime.slots.tolist() == [-1]
    runtime.set_rows([2, -1, 0])
    assert (runtime.active, runtime.uniform, runtime.rows) == (True, False, (2, -1, 0))
    assert runtime.slots.tolist() == [2, -1, 0]
    assert runtime.slots.dtype == torch.int32
    runtime.set_rows([1, 1])
    assert (runtime.active, runtime.uniform) == (True, True)
    runtime.set_rows([-1, -1])
    assert (runtime.active, runtime.uniform) == (False, True)


def test_runtime_writes_in_place_and_grows():
    runtime = Runtime(3, torch.device("cpu"))
    runtime.set_rows([0, 1])
    slots, address = runtime.slots, runtime.slots.data_ptr()
    runtime.set_rows([1, 2])
    assert runtime.slots is slots
    runtime.set_rows([0] * 5)
    assert runtime.slots.data_ptr() == address
    with torch.inference_mode():
        runtime.set_rows([2] * 1000)
    assert runtime.slots.tolist() == [2] * 1000
    runtime.set_rows([1] * 1000)  # an inference tensor could not be written here
    assert runtime.slots.tolist() == [1] * 1000


def test_runtime_refusals_change_nothing():
    runtime = Runtime(3, torch.device("cpu"))
    runtime.set_rows([2, 1])
    with pytest.raises(BatchError, match="request 1 asks for slot 3; slots are 0 to 2, -1 for"):
        runtime.set_rows([0, 3])
    with pytest.raises(BatchError, match="request 0 asks for slot -2"):
        runtime.set_rows([-2])
    with pytest.raises(BatchError, match="at least one request"):
        runtime.set_rows([])
    assert runtime.rows == (2, 1)
    assert runtime.slots.tolist() == [2, 1]


# Capture --------------------------------------------------------------------------------------


class Counting:
    """A backend that keeps the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm, inputs):
        self.graphs.append(gm)
        return gm.forward


def test_one_graph_whatever_the_batch_and_the_slots():
    model = llama()
    plain = copy.deepcopy(model)
    attachment = attach(model, ALL)
    runtime = attachment.runtime
    dense = merged(plain, write_adapter(attachment))
    backend = Counting()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad(), shape_config.patch(use_duck_shape=False):
        for rows, length in ((5, 5), (5, 7), (3, 4), (70, 3), (5, 5)):
            ids = torch.randint(0, 50, (rows, length))
            runtime.set_rows([SLOT] * rows)
            wanted = dense(ids).logits
            torch.testing.assert_close(compiled(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        write_adapter(attachment, seed=1)  # another adapter in the same slot
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        Runtime(2, torch.device("cpu"))  # of another model: no guard looks at it
        compiled(ids)
        assert len(backend.graphs) == 1
        runtime.clear()
        assert torch.equal(compiled(ids).logits, plain(ids).logits)
    with_adapters, base = backend.graphs
    nodes = [n for n in with_adapters.graph.nodes if n.op == "call_function"]
    sites = [n for n in nodes if n.target is torch.ops.lorafx.site]
    assert len(sites) == 15
    assert len([n for n in nodes if n.target is torch.ops.lorafx.embedding_site]) == 1
    # Four bank tensors a group and the slots enter as inputs; siblings share theirs.
    for index in range(2, 7):
        assert all(n.args[index].op == "placeholder" for n in sites)
    assert len({n.args[2] for n in sites}) == len(attachment.groups) - 1
    assert len({n.args[6] for n in sites}) == 1
    assert not any("lorafx" in str(n.target) for n in base.graph.nodes)


def test_scaled_embeddings_in_a_trace():
    torch.manual_seed(0)
    model = nn.Sequential(NumberScaled(9, 5))
    attachment = check(model, ["0"], {"input": torch.arange(6).view(2, 3)})
    ids = torch.arange(8).view(2, 4)
    backend = Counting()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-6, atol=1e-6)
    assert len(backend.graphs) == 1
    assert attachment.runtime.active


@pytest.mark.parametrize("module", [Halved(4, 4), Pair(4, 4)], ids=lambda m: type(m).__name__)
def test_a_call_without_place_for_the_delta_in_a_trace(module):
    """Left to the graph passes where there are some, an error where nobody would look."""
    model = nn.Sequential(module)
    attachment = attach(model)
    write_adapter(attachment)
    attachment.runtime.set_rows([SLOT, SLOT])
    x = torch.randn(2, 4)
    backend = Counting()
    torch.compile(model, backend=backend, dynamic=True)(x)
    assert not any(n.target is torch.ops.lorafx.site for n in backend.graphs[0].graph.nodes)
    attachment.runtime.graph_passes = False
    with pytest.raises(MatchError, match="has no place in this call"):
        torch.compile(model, backend="eager", dynamic=True)(x)
