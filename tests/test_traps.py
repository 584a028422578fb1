"""Each way in which a compiler of LoRA is known to go silently wrong, and that it does not here."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from dense_merge import Case, check_mixed, error, save_adapter
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafx
from lorafx.errors import CaptureError, MatchError, ProvenanceError

K, N = 6, 9
NAMES = ["a", None, "b", "a"]


def features(rows: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, length, K)}


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Case]:
    """A `Case` of one module class: adapter "a" and "b" at the given targets."""

    def make(cls: type[nn.Module], a: list[str], b: list[str] | None = None, **config: Any) -> Case:
        torch.manual_seed(0)
        base = cls().eval().requires_grad_(False)
        folders = {
            name: save_adapter(
                base, tmp_path / name, rank=rank, targets=targets, seed=rank, **config
            )
            for name, rank, targets in (("a", 2, a), ("b", 3, b or a))
        }
        return Case(base, folders)

    return make


# A weight used without its module


class Bypass(nn.Module):
    """One linear `w` used in some way, after a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.w = nn.Linear(K, N)

    def use(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.use(torch.tanh(self.first(x)))}


class ByForward(Bypass):
    def use(self, h: Tensor) -> Tensor:
        return self.w.forward(h)


class ByFunctional(Bypass):
    def use(self, h: Tensor) -> Tensor:
        return F.linear(h, self.w.weight, self.w.bias)


class ByFunctionalWithoutBias(Bypass):
    def use(self, h: Tensor) -> Tensor:
        return F.linear(h, self.w.weight)


class ByMatmul(Bypass):
    def use(self, h: Tensor) -> Tensor:
        return h @ self.w.weight.T + self.w.bias


class FromTheLeft(Bypass):
    def use(self, h: Tensor) -> Tensor:
        return (self.w.weight @ h.mT).mT + self.w.bias


class ByEinsum(Bypass):
    def use(self, h: Tensor) -> Tensor:
        return torch.einsum("btk,nk->btn", h, self.w.weight)


class ByAddmm(Bypass):
    def use(self, h: Tensor) -> Tensor:
        return torch.addmm(self.w.bias, h.flatten(0, 1), self.w.weight.t()).view(*h.shape[:2], N)


class CalledAndBypassed(Bypass):
    def use(self, h: Tensor) -> Tensor:
        return self.w(h) + F.linear(h.flip(-1), self.w.weight)


class CalledTwice(Bypass):
    def use(self, h: Tensor) -> Tensor:
        return self.w(h) + torch.tanh(self.w(h * 0.5))


BYPASSES = (
    ByForward,
    ByFunctional,
    ByFunctionalWithoutBias,
    ByMatmul,
    FromTheLeft,
    ByEinsum,
    ByAddmm,
    CalledAndBypassed,
    CalledTwice,
)


@pytest.mark.parametrize("cls", BYPASSES)
def test_weights_used_without_their_module(small, cls):
    """They are linears in disguise: each use gets its delta, once."""
    case = small(cls, ["w"], ["w", "first"])
    cm = case.compile(options={"verify": "numeric"})
    check_mixed(cm, case, NAMES, features(4, 3))


class Scaled(Bypass):
    def use(self, h: Tensor) -> Tensor:
        return h @ (self.w.weight * 2).T


class Sliced(Bypass):
    def use(self, h: Tensor) -> Tensor:
        return F.linear(h, self.w.weight[2:])


class Normed(Bypass):
    def use(self, h: Tensor) -> Tensor:
        return self.w(h) / self.w.weight.norm()


@pytest.mark.parametrize("cls", [Scaled, Sliced, Normed])
def test_an_unknown_use_is_refused_by_name_where_an_adapter_touches_it(small, cls):
    case = small(cls, ["w"], ["first"])
    cm = case.compile()
    inputs = features(2, 3)
    for names in (["a", "a"], ["a", None], ["b", "a"]):
        with pytest.raises(MatchError, match="LoRA cannot be applied at w: its weight is used in"):
            cm(**inputs, adapter_names=names)
    check_mixed(cm, case, ["b", None], inputs)
    assert torch.equal(cm(**inputs)["logits"], case.base(**inputs)["logits"])
    assert "refused (always): w: its weight is used" in str(cm.explain())


class Attention(nn.Module):
    """nn.MultiheadAttention reads `out_proj.weight` and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(K, K)
        self.attention = nn.MultiheadAttention(K, 2, batch_first=True)
        self.out = nn.Linear(K, N)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.inner(x)
        return {"logits": self.out(self.attention(h, h, h, need_weights=False)[0])}


def dense(case: Case, path: str, name: str | None) -> nn.Module:
    """The oracle where PEFT cannot merge: W + ΔW computed from the files."""
    from safetensors.torch import load_file

    model = case.model()
    if name is not None:
        state = load_file(case.folders[name] / "adapter_model.safetensors")
        a, b = (state[f"base_model.model.{path}.lora_{end}.weight"] for end in "AB")
        with torch.no_grad():
            model.get_submodule(path).weight += 2.0 * b @ a
    return model


def check_dense(cm: Any, case: Case, path: str, inputs: dict[str, Tensor], names=NAMES) -> None:
    got = cm(**inputs, adapter_names=names)["logits"]
    for row, name in enumerate(names):
        want = dense(case, path, name)(**oracle.one_row(inputs, row))["logits"][0]
        assert error(got[row], want) <= 1e-5


def saved_by_hand(folder: Path, path: str, shape: tuple[int, int], rank: int) -> Path:
    """A PEFT folder for a module that PEFT itself would not wrap."""
    import json

    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(rank)
    prefix = f"base_model.model.{path}.lora_"
    factors = {
        f"{prefix}A.weight": torch.randn(rank, shape[1]) * 0.5,
        f"{prefix}B.weight": torch.randn(shape[0], rank) * 0.5,
    }
    save_file(factors, str(folder / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [path]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def by_hand(tmp_path: Path, cls: type[nn.Module], path: str, shape: tuple[int, int]) -> Case:
    torch.manual_seed(0)
    base = cls().eval().requires_grad_(False)
    folders = {
        name: saved_by_hand(tmp_path / name, path, shape, rank)
        for name, rank in (("a", 2), ("b", 3))
    }
    return Case(base, folders)


def test_multihead_attention_out_proj(tmp_path):
    case = by_hand(tmp_path, Attention, "attention.out_proj", (K, K))
    check_dense(case.compile(), case, "attention.out_proj", features(4, 3))


class FastPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(K, 2, 10, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(x)}


@pytest.mark.parametrize("path", ["layer.linear1", "layer.self_attn.out_proj"])
def test_transformer_encoder_layers_take_no_fast_path_past_lora(tmp_path, path):
    shape = (10, K) if path.endswith("linear1") else (K, K)
    case = by_hand(tmp_path, FastPath, path, shape)
    cm = case.compile()
    inputs = features(4, 3)
    before = torch.backends.mha.get_fastpath_enabled()
    check_dense(cm, case, path, inputs)
    assert torch.backends.mha.get_fastpath_enabled() is before
    # torch leaves its fast path wherever a forward hook of any kind hangs, so bit-equality is with
    # the base model off that path; on it, the base's own numbers differ in the last place.
    with torch.no_grad():
        base = cm(**inputs)["logits"]
        assert error(base, case.base(**inputs)["logits"]) <= 1e-6
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert torch.equal(base, case.base(**inputs)["logits"])
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


# Embeddings and tied weights


class Root(nn.Embedding):
    """Scales what it returns, by a factor that nothing declares."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * math.sqrt(self.embedding_dim)


class ScaledEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = Root(11, K)
        self.head = nn.Linear(K, 11, bias=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embed(ids))}


class Tied(ScaledEmbedding):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 11, (rows, length))}


def test_the_delta_of_a_scaled_embedding_is_scaled_with_it(small):
    case = small(ScaledEmbedding, ["embed"], ["embed", "head"])
    # PEFT merges into the weight, so that the forward scales the delta too.
    check_mixed(case.compile(), case, NAMES, tokens(4, 3))


@pytest.mark.parametrize("end", ["embed", "head"])
def test_a_tied_weight_of_which_only_one_end_is_selected(small, end):
    case = small(Tied, [end])
    cm = case.compile()
    assert [site.path for site in cm.sites] == [end]
    check_mixed(cm, case, NAMES, tokens(4, 3))


def test_both_ends_of_a_tied_weight(small):
    case = small(Tied, ["embed"], ["embed", "head"])
    check_mixed(case.compile(), case, NAMES, tokens(4, 3))


class OneWeightTwice(nn.Module):
    """Two linears over one weight; its forward calls itself something other than `self`."""

    def __init__(this) -> None:
        super().__init__()
        this.w = nn.Linear(K, K)
        this.v = nn.Linear(K, K)
        this.v.weight = this.w.weight

    def forward(this, x: Tensor) -> dict[str, Tensor]:
        return {"logits": this.w(x) + torch.tanh(this.v(x))}


def test_two_modules_over_one_weight_of_which_one_is_selected(small):
    """Told apart by the module whose forward the use is in."""
    case = small(OneWeightTwice, ["w"])
    check_mixed(case.compile(), case, NAMES, features(4, 3))


# Graph breaks


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.second = nn.Linear(K, N)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        # Sequence first from here on: what the second graph is given is not batch first.
        return {"logits": self.second(h.transpose(0, 1)).transpose(0, 1)}


def test_graph_breaks(small):
    """What one graph hands to the next keeps its proof."""
    case = small(Broken, ["first", "second"], ["first"])
    cm, inputs = case.compile(), features(3, 3)
    check_mixed(cm, case, ["a", "a", "a"], inputs)
    check_mixed(cm, case, ["b", None, "b"], inputs)  # the second graph has nothing of theirs
    check_mixed(cm, case, ["a", None, "b"], inputs)
    check_mixed(cm, case, ["a", None, "b", "b"], features(4, 2))
    assert torch.equal(cm(**inputs)["logits"], case.base(**inputs)["logits"])


class BrokenOutside(Broken):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        h = torch.tensor(h.flip(0).tolist())  # nothing can be known of where this came from
        return {"logits": self.second(h).flip(0)}


def test_a_graph_break_through_python(small):
    """One adapter: right. A mixed batch that touches what comes after: refused with the reason."""
    case = small(BrokenOutside, ["first", "second"], ["first"])
    cm, inputs = case.compile(), features(3, 3)
    check_mixed(cm, case, ["a", "a", "a"], inputs)
    check_mixed(cm, case, ["b", None, "b"], inputs)
    with pytest.raises(ProvenanceError, match="at second it is not proved which request a row"):
        cm(**inputs, adapter_names=["a", None, "b"])
    assert torch.equal(cm(**inputs)["logits"], case.base(**inputs)["logits"])
    check_mixed(cm, case, ["a", "a", "a"], inputs)


class Unbreakable(nn.Module):
    """Dynamo cannot break a frame inside `with`: it runs the frame in Python and compiles what it
    calls, the linear's forward and its mark, as graphs of their own."""

    linear: type[nn.Module] = nn.Linear
    bypass = False

    def __init__(self) -> None:
        super().__init__()
        self.w = self.linear(K, N)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        try:
            with open(os.devnull):
                torch._dynamo.graph_break()
                y = self.w.forward(x) if self.bypass else self.w(x)
                torch._dynamo.graph_break()
        finally:
            torch._dynamo.graph_break()
        return {"logits": y}


class UnbreakableBypass(Unbreakable):
    bypass = True


class Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class UnbreakableGated(Unbreakable):
    linear = Gated


@pytest.mark.parametrize("cls", [Unbreakable, UnbreakableBypass])
def test_a_module_whose_frame_cannot_be_broken(small, cls):
    """Its weight's use and its mark are compiled apart: the delta must be added once."""
    case = small(cls, ["w"])
    cm, inputs = case.compile(), features(3, 3)
    check_mixed(cm, case, ["a", "a", "a"], inputs)
    check_mixed(cm, case, ["b", "b", "b"], inputs)
    assert cm.recompiles >= 1
    assert torch.equal(cm(**inputs)["logits"], case.base(**inputs)["logits"])


def test_a_forward_of_its_own_in_a_frame_that_cannot_be_broken(small):
    """Its mark alone could not know what the forward does after the product."""
    case = small(UnbreakableGated, ["w"])
    cm, inputs = case.compile(), features(3, 3)
    with pytest.raises(MatchError, match="at w: its forward is its own, and a graph break keeps"):
        cm(**inputs, adapter_names=["a", "a", "a"])
    assert torch.equal(cm(**inputs)["logits"], case.base(**inputs)["logits"])


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(K, N)
        self.fail = False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.w(x)
        if self.fail:
            raise RuntimeError("the model's own")
        return {"logits": y}


def test_a_call_that_failed_in_the_model_leaves_nothing_behind(small):
    """Dynamo gives up on a frame that raises and compiles its parts from then on."""
    case = small(Failing, ["w"])
    cm, inputs = case.compile(), features(3, 3)
    names = ["a", None, "b"]
    check_mixed(cm, case, names, inputs)
    cm.model.fail = True
    with pytest.raises(RuntimeError, match="the model's own"):
        cm(**inputs, adapter_names=names)
    cm.model.fail = False
    check_mixed(cm, case, ["b", "b", "b"], inputs)
    check_mixed(cm, case, names, inputs)
    assert torch.equal(cm(**inputs)["logits"], case.base(**inputs)["logits"])


def test_calls_from_several_threads_wait_for_one_another(small):
    """Slots are one state for the model: without a lock a call would read another one's."""
    case = small(Failing, ["w"])
    cm, inputs = case.compile(), features(3, 3)
    mixes = (["a", None, "b"], ["b", "b", None], [None, "a", "a"])
    wanted = [case.expected(names, inputs) for names in mixes]
    errors: list[float] = []

    def serve(index: int) -> None:
        for _ in range(40):
            got = cm(**inputs, adapter_names=mixes[index])["logits"]
            errors.append(error(got, wanted[index]))

    serve(0)
    threads = [threading.Thread(target=serve, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 160
    assert max(errors) <= 1e-5


# Settings, order of calls, processes


def test_banks_under_modules_that_are_not_of_torch_nn_have_fixed_sizes(small):
    """Dynamo makes the sizes of what hangs on transformers' Conv1D dynamic by itself."""

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Conv1D(N, K)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.conv(x)}

    case = small(Transposed, ["conv"], fan_in_fan_out=True)
    cm = case.compile()
    check_mixed(cm, case, NAMES, features(4, 3))
    sizes = {line for line in _captured(cm) if "lorafx.site" in line}
    assert sizes
    assert "byte floor at rank 3" in str(cm.explain())


def _captured(cm: Any) -> list[str]:
    record = cm._session.backend.records[-1]
    return next(text for name, _, text in record.dump.stages if name == "captured").splitlines()


def test_compiling_after_torch_compile_is_refused(plain):
    model = plain.model()
    model.compile(backend="eager")
    with pytest.raises(CaptureError, match=r"the model \(PlainModel\) was compiled"):
        lorafx.compile(model, plain.folders)
    with pytest.raises(CaptureError, match="compiled by lorafx already"):
        lorafx.compile(plain.compile(), plain.folders)


def test_grad_modes_share_the_graphs(plain):
    torch.manual_seed(0)
    cm = plain.compile()
    inputs = {"ids": torch.randint(0, 61, (2, 4))}
    check_mixed(cm, plain, ["a1", None], inputs)
    want = cm(**inputs, adapter_names=["a1", None])["logits"]
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            got = cm(**inputs, adapter_names=["a1", None])["logits"]
        assert torch.equal(got, want)
        assert not got.requires_grad
    assert cm.recompiles <= 2


PROCESS = """
import sys, torch
sys.path[:0] = {paths!r}
from pathlib import Path
from dense_merge import Case, check_mixed, random_base
from tiny_models import FAMILIES
import lorafx
case = Case(random_base("plain"), {{n: Path({folder!r}) / n for n in ("a0", "a1")}})
torch.manual_seed(0)
cm = lorafx.compile(
    case.model(), case.folders, options={{"lowering": "inductor", "passes": {passes!r}}}
)
check_mixed(cm, case, ["a1", None, "a0"], FAMILIES["plain"].inputs(3, 4))
print(next(t for n, _, t in cm._session.backend.records[-1].dump.stages if n == "lower"))
"""


def test_a_pass_switched_off_in_a_fresh_process_with_a_warm_cache(plain, tmp_path):
    """Rewriting where Inductor's caches do not look would serve stale code."""
    here = Path(__file__).parent
    paths = [str(here / "helpers"), str(here / "conformance")]
    folder = str(plain.folders["a0"].parent)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONSAFEPATH": "1"}
    graphs = []
    for passes in ({}, {"fuse": False}):
        source = PROCESS.format(paths=paths, folder=folder, passes=passes)
        done = subprocess.run(
            [sys.executable, "-c", source], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        graphs.append(done.stdout)
    assert graphs[0] != graphs[1]


def test_attributes_made_by_a_call_are_not_constants(small):
    """What an earlier call left on a module belongs to that call's requests."""

    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(K, N)
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            kept = x if self.kept is None else self.kept
            self.kept = x
            return {"logits": self.w(x) + self.w(kept.flip(1))}

    case = small(Remembering, ["w"])
    cm = case.compile()
    inputs = features(3, 3)
    assert cm(**inputs, adapter_names=["a", None, "b"])["logits"].shape == (3, 3, N)
    for _ in range(2):
        with pytest.raises(ProvenanceError, match="at w it is not proved"):
            cm(**features(3, 3), adapter_names=["a", None, "b"])
