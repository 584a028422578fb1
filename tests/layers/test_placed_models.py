"""Models of transformers cut among ranks by its own tensor parallelism, against one process."""

import copy
import shutil

import oracle
import placed_models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import randomise
from two_ranks import on_ranks

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}
TOKENS = {"pad_token_id": 0, "eos_token_id": None}
ROUTED = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}


def llama():
    config = transformers.LlamaConfig(
        **SIZES, **HEADS, **TOKENS, attention_bias=True, mlp_bias=True
    )
    return transformers.LlamaForCausalLM(config)


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, **HEADS, **TOKENS, **ROUTED)
    )


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **SIZES, **HEADS, **TOKENS, **ROUTED, moe_intermediate_size=24
    )
    return transformers.Qwen3MoeForCausalLM(config)


def qwen3_5():
    """One layer of each kind; those of linear attention gather what the ranks project."""
    config = transformers.Qwen3_5TextConfig(
        **{**SIZES, "num_hidden_layers": 2},
        **HEADS,
        **TOKENS,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
    )
    return transformers.Qwen3_5ForCausalLM(config)


def saved(make, folder):
    """A model and its adapters, which are on disk too."""
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    randomise(model)
    model.save_pretrained(folder / "base")
    experts = [name for name, _ in model.named_parameters() if ".experts." in name]
    linears = oracle.linears(model)
    plans = {
        "all": (3, linears, {"target_parameters": experts} if experts else {}),
        "some": (2, [name for name in linears if name.endswith(("v_proj", "down_proj"))], {}),
    }
    if experts:  # without biases, inside of which DoRA would not be known
        q_and_k = [name for name in linears if name.endswith(("q_proj", "k_proj"))]
        plans["dora"] = (2, q_and_k, {"use_dora": True})
    folders = {
        name: oracle.save_adapter(
            model, folder / name, rank=rank, targets=targets, seed=rank, **parameters
        )
        for name, (rank, targets, parameters) in plans.items()
    }
    return model, folders


COMPILED = {"lowering": "reference", "base_graphs": False}
EXPERTS = {"ep_size": 2}
CASES = {
    "llama": (2, llama, COMPILED),
    "eager": (2, llama, {"lowering": "reference", "start": "eager"}),
    "mixtral": (2, mixtral, COMPILED),
    "qwen3_moe": (2, qwen3_moe, COMPILED),
    "qwen3_5": (2, qwen3_5, COMPILED),
    "four": (4, llama, COMPILED),
    "inductor": (2, mixtral, {"lowering": "inductor"}),
    "whole_experts": (2, mixtral, {"lowering": "reference", "start": "eager"}, EXPERTS),
    "whole_experts_inductor": (2, qwen3_moe, {"lowering": "inductor"}, EXPERTS),
}
SLOW = ("qwen3_moe", "four", "inductor", "whole_experts_inductor")
#: Cases of which only logits are compared.
BRIEF = ("eager", "mixtral", "qwen3_5", "whole_experts")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES]
)
def test_mixed_batches(case, tmp_path):
    size, make, options, *settings = CASES[case]
    model, folders = saved(make, tmp_path)
    cases = oracle.Oracle.of(model, folders)
    changes = {name: torch.randn_like(p) * 0.3 for name, p in model.named_parameters()}
    changed = copy.deepcopy(model)
    changed.load_state_dict(changes)
    wanted = {"logits": cases, "updated": oracle.Oracle.of(changed, folders), "back": cases}
    ids, names = torch.randint(1, 61, (4, 5)), ["all", None, "some", list(folders)[-1]]
    batches = [(ids, names)] if case in BRIEF else [(ids, names), (ids[:2], [None, "some"])]
    update = None if case in BRIEF else changes
    arguments = (tmp_path / "base", folders, batches, options, update, *settings)
    for found in on_ranks(size, placed_models.serve, *arguments):
        assert (" eager" in found["status"]) == (case == "eager")
        assert {"updated", "back", "merged", "tokens"}.isdisjoint(found) == (case in BRIEF)
        for kind, reference in wanted.items():
            for (rows, requests), logits in zip(batches, found.get(kind, ()), strict=False):
                expected = reference.rows(requests, {"input_ids": rows})
                oracle.assert_close(logits, expected, label=f"{kind}, {requests}")
        for name, logits in {**found.get("merged", {}), None: found["base"]}.items():
            oracle.assert_close(
                logits, cases.rows([name] * len(ids), {"input_ids": ids}), label=str(name)
            )
        for row, (name, tokens) in enumerate(zip(names, found.get("tokens", ()), strict=False)):
            want = cases.model(name).generate(ids[row : row + 1], max_new_tokens=4, do_sample=False)
            assert torch.equal(tokens, want[0])


def test_what_else_ranks_do_together(tmp_path):
    model, folders = saved(llama, tmp_path)
    # PEFT keeps the base's own weights beside factors of the head.
    copies = {"embed_tokens.weight": model.model.embed_tokens.weight}
    folders["copies"] = with_tensors(folders["some"], tmp_path / "copies", copies)
    cases = oracle.Oracle.of(model, folders)
    ids = torch.arange(1, 11).view(2, 5)
    copies, base = (cases.rows([name] * 2, {"input_ids": ids}) for name in ("copies", None))
    for found in on_ranks(2, placed_models.serve_more, tmp_path / "base", folders):
        assert found["compiled"] == 0
        oracle.assert_close(found["slots"][1], [copies[0][1]], label="slots of the second row")
        oracle.assert_close(found["slots"][0, :2], [base[0][0, :2]], label="before the adapter")
        for kind in ("all", "copies"):
            for prompt, name, tokens in zip(ids.split(1), (kind, None), found[kind], strict=True):
                want = cases.model(name).generate(prompt, max_new_tokens=3, do_sample=False)
                assert torch.equal(tokens, want[0])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base" / "merged")
    oracle.assert_close(merged(input_ids=ids).logits, copies, label="merged")


def with_tensors(folder, copy, tensors):
    """A copy of a saved adapter that has these tensors of the model too."""
    shutil.copytree(folder, copy)
    state = load_file(copy / "adapter_model.safetensors")
    state |= {f"base_model.model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(state, copy / "adapter_model.safetensors")
    return copy


def test_what_is_refused_is_refused_on_all_ranks(tmp_path):
    model, folders = saved(llama, tmp_path)
    targets = [name for name in oracle.linears(model) if name.endswith("v_proj")]
    folders["biased"] = oracle.save_adapter(
        model, tmp_path / "plain", rank=2, targets=targets, bias="lora_only"
    )
    biases = {"layers.0.self_attn.v_proj.bias": torch.ones(16)}
    folders["biased"] = with_tensors(tmp_path / "plain", tmp_path / "biased", biases)
    for rank, found in enumerate(on_ranks(2, placed_models.refusals, tmp_path / "base", folders)):
        for name in ("compile", "load_adapter"):
            assert "missing" in found[name]
            assert found[name].startswith("CheckpointError: rank 1 failed: ") is (rank == 0)
        assert (found["adapters"], found["adapters after"]) == ("['some']", "['some', 'other']")
        for name in ("replaced", "unpicklable"):
            assert ": rank 1 failed: " in found[name] or rank == 1
        assert "several ranks share it" in found["bias"]
        assert "continuous batching serves no model that ranks share" in found["engine"]
        assert "is served for linears and experts only" in found["embedding"]
        assert "holds only a share of its weight; export on a single rank" in found["export"]
        assert "already carries a LoRA mark" in found["twice"]
        assert "model.layers.0 is wrapped by fully_shard (FSDP2)" in found["fsdp"]
        assert "transformers' tensor parallelism has put in" in found["plan"]


def test_experts_to_which_tokens_move_are_refused(tmp_path):
    _, folders = saved(mixtral, tmp_path)
    for found in on_ranks(2, placed_models.refused_experts, tmp_path / "base", folders):
        assert "experts are divided among ranks, between which tokens move" in found
