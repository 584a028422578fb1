"""Tiny transformers models: every site is proved, and no label of any node is contradicted.

Sequence first (XLNet), expert dispatch (Qwen3-MoE). One request's ids change; T is a multiple of B,
then T equals B.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from ownership_graphs import taint
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _compiling_state_context
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from lorafx.ownership.labels import Mixed, Own
from lorafx.ownership.propagate import flow_through
from lorafx.ownership.symbolic import BatchSymbols
from lorafx.passes.provenance import RowMap, is_site, row_map

TEXT = {
    "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "use_cache": False,  # export knows no cache classes
}  # fmt: skip
LLAMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, **TEXT,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# class, configuration, names of the inputs
MODELS = {
    "xlnet": (
        "XLNetLMHeadModel",
        {"d_model": 16, "d_inner": 24, "n_layer": 1, "n_head": 2, **TEXT},
        ("input_ids", "attention_mask"),
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM", {**LLAMA, **EXPERTS, "head_dim": 8}, ("input_ids",)
    ),
}  # fmt: skip


def mark(model: nn.Module) -> None:
    """A site op after every linear and embedding."""
    ranks, scales = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1)
    slots = torch.zeros(1, dtype=torch.int32)

    def hook(module, args, y):
        x = args[0]
        if isinstance(module, nn.Embedding):
            bank = torch.zeros(1, module.num_embeddings, 1), torch.zeros(1, 1, y.shape[-1])
            return torch.ops.lorafx.embedding_site(x, y, *bank, ranks, scales, slots, 0)
        bank = torch.zeros(1, 1, x.shape[-1]), torch.zeros(1, 1, y.shape[-1])
        return torch.ops.lorafx.site(x, y, *bank, ranks, scales, slots, [0], [0], [y.shape[-1]], 0)

    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            module.register_forward_hook(hook)


def inputs_of(names, batch: int, time: int) -> dict[str, torch.Tensor]:
    made = {}
    for name in names:
        if name == "attention_mask":
            made[name] = torch.ones(batch, time, dtype=torch.long)
            made[name][0, time - 1] = 0
        else:
            made[name] = torch.randint(3, 64, (batch, time))
    return made


def traced(
    model: nn.Module, example: dict[str, torch.Tensor]
) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """The model as a functional ATen graph, and what its first inputs are: parameters and buffers.

    Sizes of the others are symbols.
    """
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def run(*values: torch.Tensor) -> list[torch.Tensor]:
        state = dict(zip(held, values, strict=False))
        inputs = dict(zip(example, values[len(held) :], strict=True))
        found = torch.func.functional_call(model, state, kwargs=inputs)
        return [value for value in tree_leaves(found) if isinstance(value, torch.Tensor)]

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in held.values()]
    for tensor in example.values():
        dims = [DimDynamic.DYNAMIC] * tensor.dim()
        fakes.append(mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dims)))
    with torch.no_grad(), enable_python_dispatcher(), _compiling_state_context(), mode:
        graph = make_fx(dispatch_functionalize(run), decomposition_table=select_decomp_table())
        return graph(*fakes), list(held.values())


@pytest.mark.parametrize("family", ["xlnet", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_sites_are_proved_and_labels_hold(family):
    torch.manual_seed(0)
    name, config, names = MODELS[family]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).eval().requires_grad_(False)
    mark(model)
    gm, held = traced(model, inputs_of(names, 3, 5))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    users = placeholders[len(held) :]
    seeds = {node: Own(0) if node in users else None for node in placeholders}
    batch = BatchSymbols.of(node.meta["val"].shape[0] for node in users)
    flow = flow_through(gm.graph, seeds, batch)

    proofs = [row_map(node, flow) for node in gm.graph.nodes if is_site(node)]
    refused = [proof.reason for proof in proofs if not isinstance(proof, RowMap)]
    assert len(proofs) > 3
    assert not refused
    matmuls = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    products = [node for node in gm.graph.nodes if node.target in matmuls]
    assert products
    assert not any(isinstance(flow.labels[node], Mixed) for node in products)

    for requests, time in ((3, 6), (4, 4)):
        before = inputs_of(names, requests, time)
        after = {n: t.clone() for n, t in before.items()}
        for n, t in after.items():
            if n != "attention_mask":
                t[1] = inputs_of((n,), 1, time)[n][0]
        runs = [(*held, *run.values()) for run in (before, after)]
        assert taint(gm, flow, *runs, 1, requests, tolerance=1e-5) == []
