"""Reading PEFT checkpoints: equal to PEFT's own merge, every key placed or named."""

from __future__ import annotations

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorafx.adapter_store.peft_config import PeftConfig
from lorafx.adapter_store.peft_reader import Adapter, adapter_target_modules, read_adapter
from lorafx.adapter_store.saved import AdapterState
from lorafx.model.sites import Site
from lorafx.registry import lookup

pytestmark = pytest.mark.filterwarnings("ignore")

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


@settings(max_examples=60, deadline=None)
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
