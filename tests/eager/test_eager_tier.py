"""The first calls of a model, which no graph serves: right at once, or left to a graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense_merge import (
    REFERENCE,
    TOLERANCE,
    Case,
    build_case,
    case_by_targets,
    error,
    random_base,
    valid,
)
from slowly import few
from tiny_models import FAMILIES, VOCAB
from torch import Tensor, nn

import lorafx
from lorafx.errors import OutOfRangeError, ProvenanceError
from lorafx.torch_internals.versions import saves_graphs

EAGER = {**REFERENCE, "start": "eager", "cache": None}
MIXED = ["a1", None, "a0", "a2", "a1"]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def eager(model: nn.Module, adapters: Any, **options: Any) -> Any:
    return lorafx.compile(model, adapters=adapters, options={**EAGER, **options})


def check(cm: Any, case: Case, names: list[Any], inputs: Mapping[str, Any]) -> None:
    got, want = cm(**inputs, adapter_names=names)["logits"], case.expected(names, inputs)
    assert error(valid(inputs, got), valid(inputs, want)) <= TOLERANCE, names


def check_eager(cm: Any) -> None:
    """No call has needed a graph."""
    assert cm.recompiles == 0
    assert {kind.tier for kind in cm.status().kinds} <= {"eager", "compiling"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_mixed_batches_are_right_before_there_is_a_graph(family: str, tmp_path: Path) -> None:
    case = build_case(family, tmp_path)
    cm = case.compile(EAGER)
    for rows, length in ((5, 7), (4, 4), (1, 3)):
        names = MIXED[:rows]
        check(cm, case, names, FAMILIES[family].inputs(rows, length))
    check_eager(cm)


def test_reports_tell_of_calls_that_were_answered_eagerly(llama: Case) -> None:
    cm = llama.compile(EAGER)
    check(cm, llama, MIXED, FAMILIES["llama"].inputs(5, 6))
    assert "1 call: eager: its graph is compiled from its second call on" in str(cm.status())
    told = str(cm.explain())
    assert "calls are answered eagerly, as listed below" in told
    assert "no call has been made" not in told


def test_weights_that_autocast_casts(llama: Case) -> None:
    """Here an input has as many elements as a weight, beside a hook of the model's user."""
    cm, inputs = llama.compile(EAGER), FAMILIES["llama"].inputs(4, 6)
    cm._orig_mod.model.norm.register_forward_hook(lambda *_: None)
    want = llama.expected(MIXED[:4], inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = cm(**inputs, adapter_names=MIXED[:4])["logits"]
    assert error(valid(inputs, got).float(), valid(inputs, want)) <= 0.06
    check_eager(cm)


def test_the_first_call_by_generate_knows_the_models_code(llama: Case) -> None:
    cm = llama.compile(EAGER)
    cm.generate(torch.randint(3, VOCAB, (4, 6)), **GREEDY, adapter_names=MIXED[:4])
    assert not cm._entries.tiers._eager._has_unknown_code()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generated_tokens_are_each_adapters_own(tmp_path: Path, cache: Any, beams: int) -> None:
    case = build_case("llama", tmp_path)
    cm, ids = case.compile(EAGER), torch.randint(3, VOCAB, (4, 6))
    settings = {**GREEDY, "num_beams": beams, "cache_implementation": cache}
    got = cm.generate(ids, **settings, adapter_names=MIXED[:4])
    for row, name in enumerate(MIXED[:4]):
        want = case.alone(name).generate(ids[row : row + 1], **{**GREEDY, "num_beams": beams})
        assert torch.equal(got[row], want[0]), name
    check_eager(cm)


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}]
)
def test_all_that_adapters_hold_is_added(tmp_path: Path, config: dict[str, Any]) -> None:
    base = random_base("llama")
    targets = {"a0": ["q_proj", "down_proj"], "a1": ["v_proj", "o_proj"], "a2": ["k_proj"]}
    case = case_by_targets(base, tmp_path, targets, **config)
    cm = eager(case.model(), case.folders)
    check(cm, case, MIXED, FAMILIES["llama"].inputs(5, 6))
    check_eager(cm)


@pytest.fixture
def moe(tmp_path: Path) -> Case:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        vocab_size=VOCAB, head_dim=8, decoder_sparse_step=1,
    )  # fmt: skip
    base = transformers.Qwen3MoeForCausalLM(config).eval()
    targets = {"a0": ["q_proj", "o_proj"], "a1": ["v_proj"], "a2": ["k_proj", "v_proj"]}
    return case_by_targets(base, tmp_path, targets)


def test_routed_rows_are_followed(moe: Case) -> None:
    cm = moe.compile(EAGER)
    for _ in range(3):  # other routes, by what is remembered of the first
        check(cm, moe, MIXED, FAMILIES["llama"].inputs(5, 6))
    check_eager(cm)


@pytest.mark.slow
@pytest.mark.skipif(not saves_graphs(), reason="torch cannot save graphs")
def test_graphs_with_operators_of_transformers_serve(compiled_beside: None, moe: Case) -> None:
    cm, inputs = moe.compile(EAGER), FAMILIES["llama"].inputs(5, 6)
    for _ in range(2):
        check(cm, moe, MIXED, inputs)
    assert cm.wait(900)
    check(cm, moe, MIXED, inputs)
    assert [kind.tier for kind in cm.status().kinds] == ["ready"]


def test_a_slot_that_is_written_anew_is_read_anew(llama: Case, tmp_path: Path) -> None:
    """Also where the next adapter has a lower rank than the one before it."""
    inputs = FAMILIES["llama"].inputs(2, 4)
    cm = lorafx.compile(llama.model(), lorafx.LoraConfig(max_adapters=1), options=EAGER)
    for name in ("a2", "a0", "a4", "a2"):
        cm.load_adapter(llama.folders[name], "it")
        renamed = Case(llama.base, {"it": llama.folders[name]})
        check(cm, renamed, ["it", None], inputs)
        check(cm, renamed, ["it", "it"], inputs)


def test_base_rows_keep_their_bits_beside_a_row_that_overflows(plain: Case) -> None:
    cm, model = plain.compile(EAGER), plain.model()
    ids = torch.randint(0, VOCAB, (3, 4))
    with torch.no_grad():
        for tree in (cm._orig_mod, model):
            tree.embed.weight[ids[0]] = torch.inf
    got = cm(ids=ids, adapter_names=[None, "a1", None])["logits"]
    with torch.no_grad():
        want = model(ids=ids)["logits"]
    assert torch.equal(got[2], want[2])
    assert torch.equal(got[0].isnan(), want[0].isnan())


@pytest.mark.parametrize("cache", [None, "static"])
def test_inference_mode(llama: Case, cache: str | None) -> None:
    cm, inputs = llama.compile(EAGER), FAMILIES["llama"].inputs(3, 5)
    with torch.inference_mode():
        ids = torch.randint(3, VOCAB, (3, 5))
        tokens = cm.generate(ids, **GREEDY, cache_implementation=cache, adapter_names=MIXED[:3])
    check(cm, llama, MIXED[:3], inputs)
    assert torch.equal(tokens, cm.generate(ids.clone(), **GREEDY, adapter_names=MIXED[:3]))
    check_eager(cm)


def test_a_token_that_the_vocabulary_lacks_is_named(llama: Case) -> None:
    cm = llama.compile(EAGER)
    for names in (["a0", None], [None, None]):
        with pytest.raises(OutOfRangeError, match=r"input_ids .* holds 5 to 161"):
            cm(input_ids=torch.tensor([[5, 161], [7, 8]]), adapter_names=names)


class Indexing(nn.Module):
    """Raises an IndexError of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.names = nn.Linear(6, 6), ["first"]

    def forward(self, x: Tensor, place: int = 0, column: int = 0) -> dict[str, Tensor]:
        self.names[place]
        return {"logits": self.w(x) + x[:, column : column + 1] * x[0, column]}


def test_an_index_error_of_the_model_stays_as_it_is(small: Any) -> None:
    case = small(Indexing, ["w"])
    cm, x = case.compile(EAGER), torch.randn(3, 6)
    for names in (["a", None, "b"], [None] * 3):
        with pytest.raises(IndexError, match="list index") as raised:
            cm(x=x, place=2, adapter_names=names)
        assert not isinstance(raised.value, lorafx.LorafxError)
        with pytest.raises(IndexError, match="index 9 is out of bounds") as raised:
            cm(x=x, column=9, adapter_names=names)
        assert not isinstance(raised.value, lorafx.LorafxError)


# --- models whose rows move ---

K = 6


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.w = nn.Linear(K, K)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.rest(torch.tanh(self.first(x)))}

    def rest(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class SwappedSlices(Rows):
    def rest(self, h: Tensor) -> Tensor:
        half = len(h) // 2
        swapped = torch.empty_like(h)
        swapped[:half], swapped[half:] = h[half:], h[:half]
        out = self.w(swapped)
        return torch.cat([out[half:], out[:half]])


class Branch(Rows):
    """The second call takes another way than the first, by what the rows hold."""

    def rest(self, h: Tensor) -> Tensor:
        turned = bool(h.sum() > 0)
        return self.w(h.flip(0)).flip(0) if turned else self.w(h)


class Sorted(Rows):
    def rest(self, h: Tensor) -> Tensor:
        order = h[:, 0, 0].argsort()
        return self.w(h[order])[order.argsort()]


class Gathered(Rows):
    def rest(self, h: Tensor) -> Tensor:
        index = h[:, 0, 0].argsort()[:, None, None].expand_as(h)
        return torch.zeros_like(h).scatter(0, index, self.w(h.gather(0, index)))


class ByPythonList(Rows):
    def rest(self, h: Tensor) -> Tensor:
        order = torch.tensor(list(range(len(h)))[::-1])
        return self.w(h[order])[order]


class InPlace(Rows):
    def rest(self, h: Tensor) -> Tensor:
        h[:] = h.flip(0)
        return self.w(h).flip(0)


class ThroughData(Rows):
    def rest(self, h: Tensor) -> Tensor:
        h.data.copy_(h.flip(0).clone())
        return self.w(h).flip(0)


class ByNumpy(Rows):
    def rest(self, h: Tensor) -> Tensor:
        rows = h.numpy()
        rows[:] = rows[::-1].copy()
        return self.w(h).flip(0)


class ByDlpack(Rows):
    @torch._dynamo.disable
    def rest(self, h: Tensor) -> Tensor:
        view = torch.from_dlpack(h.__dlpack__())
        view.copy_(h.flip(0).clone())
        return self.w(h).flip(0)


class Guided(Rows):
    """Rows of no request are computed beside each row, by its adapter."""

    def rest(self, h: Tensor) -> Tensor:
        without, given = self.w(torch.cat([torch.ones_like(h), h])).chunk(2)
        return without + 2 * (given - without)


class ForwardAlone(Rows):
    """The mark of a module does not come where its forward is called past it."""

    def rest(self, h: Tensor) -> Tensor:
        return self.w.forward(h)


class Listwise(Rows):
    """An operator that writes lists of tensors has no results, and torch counts no write of it."""

    def rest(self, h: Tensor) -> Tensor:
        moved = h.flip(0)
        torch._foreach_mul_([h, moved], 2.0)  # of other owners
        return self.w(h) + self.w(moved).flip(0)


class Caught(Rows):
    def rest(self, h: Tensor) -> Tensor:
        try:
            return self.w(h.gather(0, torch.zeros_like(h, dtype=torch.long)))
        except Exception:
            return h


MODELS = (
    SwappedSlices, Branch, Sorted, Gathered, ByPythonList, InPlace, ThroughData, ByNumpy, ByDlpack,
    Guided, ForwardAlone, Listwise, Caught,
)  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_rows_that_move_are_right_or_refused(model: type[Rows], small: Any) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    case = small(model, ["first", "w"])
    cm = case.compile({"start": "eager", "cache": None})
    outcomes = []
    for seed in range(4):
        torch.manual_seed(seed)
        inputs = {"x": torch.randn(4, 3, K)}
        for names in (["a", None, "b", "a"], ["b", "a", None, None], ["a"] * 4):
            try:
                got = cm(**{"x": inputs["x"].clone()}, adapter_names=names)["logits"]
            except lorafx.LorafxError as refused:
                outcomes.append(str(refused))
                continue
            outcomes.append(None)
            assert error(got, expected(case, names, inputs)) <= TOLERANCE, (model, names)
    assert None in outcomes  # one adapter for all rows
    assert "start='eager'" not in str(outcomes)  # which is on


def test_lists_of_tensors_are_written_in_sight(small: Any) -> None:
    """So the call is answered, and not taken for one that code unseen has written into."""

    class Doubled(Rows):
        def rest(self, h: Tensor) -> Tensor:
            out = self.w(h)
            torch._foreach_mul_([out, h], 2.0)
            return out + h

    case, inputs = small(Doubled, ["first", "w"]), {"x": torch.randn(3, 3, K)}
    cm = case.compile({"start": "eager", "cache": None})
    got = cm(**inputs, adapter_names=["a", None, "b"])["logits"]
    assert error(got, expected(case, ["a", None, "b"], inputs)) <= TOLERANCE
    (kind,) = cm.status().kinds
    assert (kind.tier, kind.reason) == ("eager", "")


def expected(case: Case, names: list[Any], inputs: Mapping[str, Tensor]) -> Tensor:
    """Row b of the result of the whole batch under row b's own weights: these models move rows by
    what all of them hold."""
    rows = []
    for row, name in enumerate(names):
        with torch.no_grad():
            rows.append(case.alone(name)(x=inputs["x"].clone())["logits"][row])
    return torch.stack(rows)


class Appending(nn.Module):
    """Writes into its arguments before it does what eager mode cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, K)

    def forward(self, x: Tensor, cache: list[Tensor], table: Tensor) -> dict[str, Tensor]:
        cache.append(x * 2)
        table += 1
        index = x[:, :, :1].argsort(0).expand_as(x)
        noise = torch.rand(())
        return {"logits": self.w(x.gather(0, index)) + noise}


def test_a_call_that_needs_a_graph_has_changed_nothing(small: Any) -> None:
    torch._dynamo.reset()
    case = small(Appending, ["w"])
    cm = case.compile({"start": "eager", "cache": None})
    cache: list[Tensor] = []
    table, x = torch.zeros(3), torch.randn(3, 2, K)
    state = torch.get_rng_state()
    with pytest.raises(ProvenanceError):
        cm(x=x, cache=cache, table=table, adapter_names=["a", None, "b"])
    assert cache == []
    assert table.tolist() == [0.0] * 3
    assert torch.equal(torch.get_rng_state(), state)


def test_adapters_and_mixes_are_remembered_in_bounds(llama: Case) -> None:
    cm = llama.compile(EAGER)
    remembered = cm._entries.tiers._eager._remembered
    remembered._most = 16 * 50
    for length in range(2, 8):
        check(cm, llama, MIXED[:3], FAMILIES["llama"].inputs(3, length))
    known = len(remembered.results)
    assert known < 400
    check(cm, llama, ["a2", "a0", None], FAMILIES["llama"].inputs(3, 7))


class Probe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(24, 5), nn.Linear(5, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)))


def steering(held: str) -> Any:
    """A hook that changes what a layer returns, by what its user has made before."""
    generator = torch.Generator().manual_seed(0)
    vector, probe = torch.randn(24, generator=generator), Probe().requires_grad_(False)
    if held == "direction":
        return lambda module, args, y: y - (y @ vector)[..., None] * vector / vector.norm()
    if held == "module":
        return lambda module, args, y: y + probe(y)
    last = [torch.zeros(24)]

    def of_last_call(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        before, last[0] = last[0], y[0, -1].clone()
        return y + before

    return of_last_call


@pytest.mark.parametrize("held", few(["direction", "module"], "direction"))
@pytest.mark.parametrize("start", ["eager", "compiled"])
def test_hooks_that_steer_by_what_they_hold(llama: Case, start: str, held: str) -> None:
    cm, inputs, hook = llama.compile({**EAGER, "start": start}), {}, steering(held)
    inputs["input_ids"] = torch.randint(3, VOCAB, (4, 6))
    want = []
    for row, name in enumerate(MIXED[:4]):
        alone = copy.deepcopy(llama.alone(name))
        alone.model.layers[0].register_forward_hook(hook)
        want.append(alone(inputs["input_ids"][row : row + 1]).logits)
    if start == "eager":
        cm.generate(**inputs, **GREEDY, adapter_names=MIXED[:4])
    cm._orig_mod.model.layers[0].register_forward_hook(hook)
    assert error(cm(**inputs, adapter_names=MIXED[:4])["logits"], torch.cat(want)) <= TOLERANCE
    if start == "eager":
        check_eager(cm)


def test_what_a_hook_keeps_of_a_call_belongs_to_its_requests(llama: Case) -> None:
    cm, ids = llama.compile(EAGER), torch.randint(3, VOCAB, (4, 6))
    cm._orig_mod.model.layers[0].register_forward_hook(steering("last call"))
    cm(ids, adapter_names=MIXED[:4])
    with pytest.raises(ProvenanceError, match="it is not known which requests"):
        cm(ids, adapter_names=MIXED[:4])
