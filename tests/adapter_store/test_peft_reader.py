"""Reading PEFT checkpoints: equal to PEFT's own merge; each key is placed, or an error names it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marking import llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_reader import Adapter, adapter_target_modules, read_adapter
from lorafx.adapter_store.saved import AdapterState
from lorafx.config import LoraConfig
from lorafx.errors import CheckpointError, LorafxWarning
from lorafx.model.sites import Site
from lorafx.registry import lookup
from lorafx.runtime.marking import build_sites

pytestmark = pytest.mark.filterwarnings("ignore")


class Plain(nn.Module):
    """Two linears of unequal sizes and an embedding, called in no particular way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.embed(ids))))


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=24, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": _gpt2,
    "plain": Plain,
}


@pytest.fixture
def build() -> Callable[[str], nn.Module]:
    """Model by name, with the same random weights every time."""

    def make(name: str) -> nn.Module:
        torch.manual_seed(7)
        return _MODELS[name]().eval()

    return make


@pytest.fixture
def sites_of() -> Callable[..., list[Site]]:
    """The sites of a model whose path ends in one of `names` (all eligible ones by default)."""

    def make(model: nn.Module, names: Sequence[str] = ("",)) -> list[Site]:
        sites = []
        for path, module in model.named_modules():
            entry = lookup(module)
            if entry is not None and path.endswith(tuple(names)):
                weight = getattr(module, entry.weight)
                sizes = entry.sizes(module)
                sites.append(Site(path, (), module, entry, *sizes, weight.dtype, weight.device))
        return sites

    return make


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Wrap a model with PEFT, randomise the adapter, save it; returns the folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(model: nn.Module, folder: str = "adapter", dtype=None, **config) -> Path:
        torch.manual_seed(len(folder))
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
                    if dtype is not None:
                        parameter.data = parameter.data.to(dtype)
        wrapped.save_pretrained(str(tmp_path / folder))
        return tmp_path / folder

    return make


QKV = ["q_proj", "k_proj", "v_proj"]


def merge(model: nn.Module, adapter: Adapter, sites: list[Site]) -> dict[str, torch.Tensor]:
    """Every parameter of `model` with the adapter's differences added, in float32."""
    merged = {
        name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)
    }
    for site in sites:
        if site.path in adapter.weights:
            a, b, scale, *_ = adapter.weights[site.path]
            delta = scale * (b.float() @ a.float())
            swap = site.eligible.transposed or site.eligible.kind == "embedding"
            merged[f"{site.path}.weight"] += delta.t() if swap else delta
    return merged


CASES = {
    "plain lists": ("llama", {"r": 3, "lora_alpha": 7, "target_modules": [*QKV, "down_proj"]}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 5, "use_rslora": True, "target_modules": QKV}),
    "patterns": (
        "llama",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": "all-linear",
            "rank_pattern": {
                r"layers\.1\..*q_proj": 5,
                "q_proj": 3,
                "^model.layers.0.mlp.up_proj": 1,
            },
            "alpha_pattern": {"v_proj": 9, r"0\.self_attn\..*": 11},
            "use_rslora": True,
        },
    ),
    "regex and excludes": (
        "llama",
        {"r": 2, "target_modules": r".*\.\d+\.mlp\..*_proj", "exclude_modules": ["up_proj"]},
    ),
    "one layer": ("llama", {"r": 2, "target_modules": QKV, "layers_to_transform": [1]}),
    "embedding and head": ("llama", {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}),
    "tied embedding": ("llama-tied", {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}),
    "Conv1D": (
        "gpt2",
        {"r": 3, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc", "wte"]},
    ),
    "plain module": ("plain", {"r": 3, "target_modules": ["embed", "up", "down"]}),
    "mica": ("llama", {"r": 2, "target_modules": QKV, "init_lora_weights": "mica"}),
    "velora": ("llama", {"r": 2, "target_modules": QKV, "velora_config": {"num_groups": 4}}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_peft_merge(case, build, sites_of, save):
    model_name, config = CASES[case]
    folder = save(build(model_name), **config)
    model = build(model_name)
    sites = sites_of(model)
    adapter = read_adapter(folder, "a", sites, model=model)
    oracle = peft.PeftModel.from_pretrained(build(model_name), str(folder)).merge_and_unload()
    ours, touched = merge(model, adapter, sites), 0
    for name, expected in oracle.named_parameters(remove_duplicate=False):
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # PEFT merges the embedding's difference into the tied head as well
        torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=1e-6)
        touched += not torch.equal(expected, model.get_parameter(name))
    assert touched == len(adapter.weights) > 0
    targets = adapter_target_modules(folder, model)
    assert set(targets.modules) == set(adapter.weights)
    assert targets.rank == adapter.rank == max(w.rank for w in adapter.weights.values())


STYLES = {
    "peft": lambda m, f, w: f"base_model.model.{m}.{f}{w}",
    "bare": lambda m, f, w: f"{m}.{f}{w}",
    "compiled": lambda m, f, w: f"base_model.model._orig_mod.{m}.{f}{w}",
    "compiled outside": lambda m, f, w: f"_orig_mod.base_model.model.{m}.{f}{w}",
    "adapter name": lambda m, f, w: f"base_model.model.{m}.{f}.default{w}",
    "bare adapter name": lambda m, f, w: f"{m}.{f}.some_name{w}",
}


@settings(max_examples=60)
@given(
    modules=st.dictionaries(
        st.from_regex(r"(block|layers\.[0-3])\.(q|mlp\.up|model)", fullmatch=True),
        st.tuples(*[st.integers(1, 9)] * 3, st.booleans()),
        min_size=1,
        max_size=5,
    ),
    style=st.sampled_from(list(STYLES)),
    alpha=st.floats(0.1, 64),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_round_trip(modules, style, alpha, rslora, dtype):
    """Random shapes, ranks and key styles come back as they were, with the right scale."""
    model, sites, tensors, ranks = nn.Module(), [], {}, {}
    for path, (r, k, n, embedding) in modules.items():
        module = nn.Embedding(k, n) if embedding else nn.Linear(k, n)
        *above, last = path.split(".")
        parent = model
        for name in above:
            parent._modules.setdefault(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, module)
        entry = lookup(module)
        sites.append(Site(path, (), module, entry, k, n, torch.float32, torch.device("cpu")))
        part, tail = ("lora_embedding", "") if embedding else ("lora", ".weight")
        ranks[path.replace(".", r"\.")] = r
        for letter, shape in (("A", (r, k)), ("B", (n, r))):
            key = STYLES[style](path, f"{part}_{letter}", tail)
            tensors[key] = torch.randn(shape).to(dtype)
    fields = {"r": 1, "lora_alpha": alpha, "rank_pattern": ranks, "use_rslora": rslora}
    state = AdapterState(PeftConfig.read(fields), tensors, "memory")
    adapter = read_adapter(state, "a", sites, model=model)
    targets = adapter_target_modules(state, model)
    assert set(adapter.weights) == set(modules) == set(targets.modules)
    for path, (r, k, n, _) in modules.items():
        a, b, scale, *_ = adapter.weights[path]
        assert (a.shape, b.shape) == ((r, k), (n, r))
        assert any(a is t for t in tensors.values())
        assert scale == pytest.approx(alpha / (r**0.5 if rslora else r))


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = "base_model.model."
UP = f"{BASE}up.lora_"
PAIRS = {
    f"{UP}A.weight": torch.ones(2, 6),
    f"{UP}B.weight": torch.ones(10, 2),
    f"{BASE}down.lora_A.weight": torch.ones(2, 10),
    f"{BASE}down.lora_B.weight": torch.ones(6, 2),
    f"{BASE}embed.lora_embedding_A": torch.ones(2, 11),
    f"{BASE}embed.lora_embedding_B": torch.ones(6, 2),
}


def plain() -> nn.Module:
    torch.manual_seed(7)
    return Plain()


def read(
    change: dict[str, Tensor | None],
    config: dict[str, Any] | None = None,
    model: nn.Module | None = None,
    targets: Any = ("up", "down", "embed"),
    **kwargs: Any,
) -> Adapter:
    """The adapter with some tensors changed, or taken out, on a plain model."""
    changed = {**PAIRS, **change}
    tensors = {key: tensor for key, tensor in changed.items() if tensor is not None}
    fields = {"r": 2, "target_modules": ["up", "down", "embed"], **(config or {})}
    state = AdapterState(PeftConfig.read(fields), tensors, "memory")
    model = plain() if model is None else model
    inner = getattr(model, "_orig_mod", model)
    _, sites = build_sites(inner, LoraConfig(target_modules=[*targets]))
    return read_adapter(state, "mine", sites, model=model, **kwargs)


BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "wrong K": (
        {f"{UP}A.weight": torch.ones(2, 5)},
        r"up\.lora_A\.weight has shape \(2, 5\), up needs \(r, 6\)",
    ),
    "wrong r": ({f"{UP}B.weight": torch.ones(10, 3)}, r"\(10, 3\), up needs \(10, r = 2\)"),
    "empty": ({f"{UP}A.weight": torch.ones(0, 6)}, "without gathering its shards"),
    "A alone": ({f"{UP}B.weight": None}, "up has no factor B"),
    "NaN": ({f"{UP}A.weight": torch.full((2, 6), torch.nan)}, "holds 12 NaN or infinite values"),
    "differing twin": ({"up.lora_A.weight": torch.zeros(2, 6)}, "both lora_A of up and differ"),
    "leftover": ({f"{BASE}up.thing": torch.ones(2)}, r"up\.thing is not a LoRA factor"),
    "unknown module": (
        {f"{BASE}upp.lora_A.weight": torch.ones(2, 6)},
        "base_model.model.upp: no such module in this model; nearest: up",
    ),
    "changed base weight": (
        {f"{BASE}embed.base_layer.weight": torch.ones(11, 6)},
        r"embed\.base_layer\.weight \(11, 6\) is a base weight that differs",
    ),
    "tokens that nothing names": (
        {f"{BASE}embed.token_adapter.trainable_tokens_delta": torch.ones(2, 12)},
        "trainable_token_indices does not say of embed",
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(case: str) -> None:
    change, message = BROKEN[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(change)
    assert "adapter 'mine' in " in str(caught.value)


@pytest.mark.quick
@pytest.mark.parametrize("compiled", [False, True])
def test_unselected_module(compiled: bool) -> None:
    model: Any = torch.compile(plain()) if compiled else plain()
    with pytest.raises(CheckpointError, match="down exists but was not selected") as caught:
        read({}, model=model, targets=("up", "embed"))
    assert len(str(caught.value).splitlines()) == 2  # and is not reported a second time


@pytest.mark.quick
def test_a_targeted_module_that_the_file_lacks() -> None:
    change: dict[str, Tensor | None] = {key: None for key in PAIRS if "down" in key}
    message = r"no factors for 1 of them \(33 %\): down"
    with pytest.raises(CheckpointError, match=message):
        read(change, strict=True)
    with pytest.warns(LorafxWarning, match=message):
        assert {*read(change).weights} == {"up", "embed"}
    with warnings.catch_warnings():  # down is no site: nobody asked for it
        warnings.simplefilter("error", LorafxWarning)
        read(change, targets=("up", "embed"), strict=True)


@pytest.mark.quick
def test_saved_copies_of_base_weights_are_compared(build, sites_of, save) -> None:
    """PEFT saves the embedding's base weight beside its factors; equal ones are no problem."""
    folder = save(build("llama"), r=2, target_modules=["embed_tokens", "lm_head"])
    assert any(k.endswith("embed_tokens.base_layer.weight") for k in load_file(folder / WEIGHTS))
    for dtype in (torch.float32, torch.bfloat16):
        model = build("llama").to(dtype)
        assert len(read_adapter(folder, "a", sites_of(model), model=model).weights) == 2
    other = build("llama")
    other.model.embed_tokens.weight.data += 1
    with pytest.raises(CheckpointError, match="base weight that differs"):
        read_adapter(folder, "a", sites_of(other), model=other)


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


FILES = {
    "truncated": (_truncate, "not a readable safetensors file"),
    "absent": (lambda f: (f / WEIGHTS).unlink(), "holds no adapter weights"),
    "no configuration": (lambda f: (f / CONFIG).unlink(), "has no configuration, and without α"),
    "no factors": (lambda f: save_file({}, f / WEIGHTS), "holds no LoRA factors"),
}


@pytest.mark.quick
@pytest.mark.parametrize("case", FILES)
def test_unreadable_folder(case: str, tmp_path: Path) -> None:
    damage, message = FILES[case]
    folder = tmp_path / "sql"
    folder.mkdir()
    save_file(PAIRS, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    damage(folder)
    model = plain()
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, "a", build_sites(model, LoraConfig())[1], model=model)
    with pytest.raises(CheckpointError, match=message):
        adapter_target_modules(folder, model)
    if (folder / CONFIG).exists():
        with pytest.raises(CheckpointError, match="its subfolders with adapters are sql"):
            read_adapter(tmp_path, "a", [], model=model)
