"""Tiny mixture-of-experts models of transformers, and adapters of their experts with an oracle.

    ΔW[e] = s · B[e] A[e],   s = 2

Adapters are saved by PEFT with `target_parameters`, or by hand with a pair for each expert and
projection, as files from before the experts were fused have them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import tiny
import torch
from dense_merge import Case
from hand_made import SCALE, factors, merged
from safetensors.torch import save_file
from torch import Tensor, nn

#: One expert's pair: A (r, K), B (N, r).
Pair = tuple[Tensor, Tensor]


class Projection(NamedTuple):
    """Where one expert's projection lies: parameter's path, expert, what it covers of it."""

    parameter: str
    expert: int
    half: str


#: Configurations by model type: one layer, with experts; two where the first one is dense.
SMALL: dict[str, dict[str, Any]] = {
    # Two groups of experts of which one is chosen for each token.
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 2, "topk_group": 1},
    "glm4_moe": {"num_hidden_layers": 1, "first_k_dense_replace": 0},
    "qwen3_next": {},  # a layer of linear attention, one of full attention
}
#: Who is in a batch of five.
MIXED = ["params", None, "older", "down", "dense"]

#: Classes that are not the first of their model type.
CLASSES = {"qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration"}


def moe_base(model_type: str) -> nn.Module:
    """A tiny model of this type with random weights of unit gain, the same every time."""
    if model_type in CLASSES:
        family = tiny.Family("causal", model_type, CLASSES[model_type])
    else:
        family = next(f for f in tiny.families("causal") if f.model_type == model_type)
    model = tiny.build(family, **SMALL.get(model_type, {}))
    if model_type not in SMALL:
        path, _ = next(experts_modules(model))
        del model.get_submodule(path.partition(".layers.")[0]).layers[1:]
        model.config.get_text_config().num_hidden_layers = 1
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.requires_grad_(False)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of everything that holds fused experts."""
    for path, module in model.named_modules():
        if "gate_up_proj" in module._parameters and module._parameters["gate_up_proj"].dim() == 3:
            yield path, module


def router_names(model: nn.Module) -> list[str]:
    """Paths of the modules that hold a raw matrix beside the experts: the routers."""
    found = []
    for path, _ in experts_modules(model):
        parent = path.rpartition(".")[0]
        for name, child in model.get_submodule(parent).named_children():
            weight = child._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and name in ("gate", "router"):
                found.append(f"{parent}.{name}")
    return found


def is_transposed(model: nn.Module, module: nn.Module) -> bool:
    """Whether the experts are stored (E, K, N), by the model's hidden size."""
    hidden = model.config.get_text_config().hidden_size
    up, down = module.gate_up_proj.shape, module.down_proj.shape
    if up[1] == hidden and up[2] == 2 * down[1] and down[2] == hidden:
        return not (up[2] == hidden and not getattr(module, "is_transposed", False))
    return False


def add(model: nn.Module, where: Projection, delta: Tensor) -> None:
    """W += delta (N, K), the columns of one expert's projection."""
    path, _, name = where.parameter.rpartition(".")
    module = model.get_submodule(path)
    weight = module._parameters[name][where.expert]
    rows = weight.T if is_transposed(model, module) else weight
    if where.half != "all":
        half, up = rows.shape[0] // 2, where.half == "up"
        stacked = getattr(module, "is_concatenated", True)
        rows = rows[half * up : half * (1 + up)] if stacked else rows[int(up) :: 2]
    rows += delta


def pairs_of(
    model: nn.Module, rank: Callable[[int, str], int], *, seed: int, gain: float = 0.5
) -> dict[Projection, Pair]:
    """A random pair for the gate, up and down projection of each expert.

    `rank` says the rank of (expert, name); 0 leaves it out.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, module in experts_modules(model):
        hidden = model.config.get_text_config().hidden_size
        up = module.gate_up_proj.numel() // module.gate_up_proj.shape[0] // hidden // 2
        for expert in range(module.gate_up_proj.shape[0]):
            for name, parameter, half, k, n in (
                ("gate_proj", "gate_up_proj", "gate", hidden, up),
                ("up_proj", "gate_up_proj", "up", hidden, up),
                ("down_proj", "down_proj", "all", up, hidden),
            ):
                r = rank(expert, name)
                if r:
                    a = torch.randn(r, k, generator=generator) * k**-0.5 * (gain / SCALE)
                    b = torch.randn(n, r, generator=generator) * r**-0.5
                    found[Projection(f"{path}.{parameter}", expert, half)] = (a, b)
    return found


def older_name(where: Projection) -> str:
    """`mlp.experts.3.gate_proj`: the path of the projection when each expert was a module."""
    module, _, name = where.parameter.rpartition(".")
    name = name if where.half == "all" else f"{where.half}_proj"
    return f"{module}.{where.expert}.{name}"


def mixtral_name(where: Projection) -> str:
    """`block_sparse_moe.experts.3.w1`: the same in Mixtral."""
    word = {"gate": "w1", "up": "w3", "all": "w2"}[where.half]
    path = re.sub(r"\.mlp\.", ".block_sparse_moe.", where.parameter.rpartition(".")[0])
    return f"{path}.{where.expert}.{word}"


def write(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter folder with these tensors under `base_model.model.`."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {f"base_model.model.{k}": v.contiguous().clone() for k, v in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": SCALE, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def save_older(
    folder: Path,
    pairs: Mapping[Projection, Pair],
    name: Callable[[Projection], str] = older_name,
    others: Mapping[str, Pair] | None = None,
) -> Path:
    """The pairs as modules of their own, unequal ranks by rank_pattern and alpha_pattern; `others`
    are pairs of linears by path."""
    tensors, ranks = {}, {}
    named = {name(where): pair for where, pair in pairs.items()} | dict(others or {})
    for path, (a, b) in named.items():
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a, b
        ranks[re.escape(path)] = a.shape[0]
    alphas = {path: SCALE * rank for path, rank in ranks.items()}
    return write(folder, tensors, rank_pattern=ranks, alpha_pattern=alphas)


@torch.no_grad()
def merged_pairs(
    base: nn.Module, pairs: Mapping[Projection, Pair], others: Mapping[str, Pair] | None = None
) -> nn.Module:
    """A copy of `base` with W + ΔW, of experts and of linears by path."""
    twin = merged(base, others or {})
    for where, (a, b) in pairs.items():
        add(twin, where, SCALE * (b @ a))
    return twin


def ids(rows: int = 5, length: int = 6, seed: int = 1) -> dict[str, Tensor]:
    """Arguments of a call with random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(5, 100, (rows, length), generator=generator)}


def some(expert: int, name: str) -> int:
    """Ranks that differ by expert and projection; expert 2 has nothing, expert 3 no up."""
    if expert == 2 or (expert == 3 and name == "up_proj"):
        return 0
    return {"gate_proj": 2, "up_proj": 3, "down_proj": 1}[name] + expert % 2


def moe_case(model_type: str, folder: Path, base: nn.Module | None = None) -> Case:
    """A base with four adapters: "params" of PEFT on experts, routers and every linear, "older"
    with a name for each expert and every second linear, "down" of PEFT on one parameter, "dense"
    of PEFT on linears alone."""
    base = moe_base(model_type) if base is None else base
    routers, linears = router_names(base), oracle.linears(base)
    attention = [path for path in linears if path.endswith(("q_proj", "o_proj"))]
    folders = {
        "params": oracle.save_adapter(
            base,
            folder / "params",
            rank=3,
            targets=linears,
            seed=1,
            target_parameters=[
                "experts.gate_up_proj",
                "experts.down_proj",
                *(f"{path}.weight" for path in routers if path not in linears),
            ],
            rank_pattern={"experts.down_proj": 2},
            alpha_pattern={"experts.gate_up_proj": 4},
        ),
        "down": oracle.save_adapter(
            base,
            folder / "down",
            rank=2,
            targets=attention[:1],
            seed=2,
            target_parameters=["experts.down_proj"],
        ),
        "dense": oracle.save_adapter(base, folder / "dense", rank=2, targets=attention, seed=3),
    }
    case = Case(base, folders)
    pairs = pairs_of(base, some, seed=4)
    others = factors(base, linears[::2], rank=2, seed=5, gain=0.3)
    name = mixtral_name if model_type == "mixtral" else older_name
    folders["older"] = save_older(folder / "older", pairs, name, others)
    case.merged["older"] = merged_pairs(base, pairs, others)
    return case
