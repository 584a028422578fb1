"""Int8 layers: what they hold, how they are loaded, and LoRA on quantised packed layers."""

import oracle
import pytest
import torch
from tensor_parallel import example, llama_config
from tiny import randomise
from transformers import LlamaForCausalLM

import lorafx
from lorafx.layers import Int8ChannelLinearMethod, QKVParallelLinear, ReplicatedLinear, load_weights


def int8(**options):
    return QKVParallelLinear(6, 3, 4, 2, quant_method=Int8ChannelLinearMethod(), **options)


def test_computes_with_the_dequantised_weight():
    layer = int8()
    dense = torch.randn(24, 6)
    dense[5] = 0  # a row without a scale of its own
    layer.load_weight("weight", dense)
    assert layer.weight.dtype == torch.int8
    assert layer.weight_scale.shape == (24,)
    weight = layer.quant_method.dequantize(layer)
    assert ((weight - dense).abs() <= layer.weight_scale[:, None] / 2 + 1e-6).all()
    assert int(layer.weight.abs().max()) == 127
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias)


def test_weights_may_be_made_ready_after_loading():
    class Transposed(lorafx.layers.UnquantizedLinearMethod):
        """Keeps a copy in another layout, as kernels ask for."""

        def process_weights_after_loading(self, layer):
            layer.kernel_weight = layer.weight.t().contiguous()

        def apply(self, layer, x, bias=None):
            return x @ layer.kernel_weight + bias

    layer = ReplicatedLinear(4, 3, quant_method=Transposed())
    weight, bias = torch.randn(3, 4), torch.randn(3)
    load_weights(layer, [("weight", weight), ("bias", bias)])
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), x @ weight.T + bias)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The example Llama in int8, the Hugging Face one with the same numbers, and adapters."""
    torch.manual_seed(0)
    config = llama_config()
    reference = LlamaForCausalLM(config).eval().requires_grad_(False)
    randomise(reference)
    model = example("parallel_llama").ParallelLlama(config, Int8ChannelLinearMethod()).eval()
    load_weights(model, reference.state_dict())
    layer, theirs = model.model.layers[0], reference.model.layers[0]
    pairs = (
        (layer.self_attn.qkv_proj, ["q_proj", "k_proj", "v_proj"], theirs.self_attn),
        (layer.self_attn.o_proj, ["o_proj"], theirs.self_attn),
        (layer.mlp.gate_up_proj, ["gate_proj", "up_proj"], theirs.mlp),
        (layer.mlp.down_proj, ["down_proj"], theirs.mlp),
    )
    for packed, names, holder in pairs:
        dense = packed.quant_method.dequantize(packed).split(packed.output_sizes)
        for name, rows in zip(names, dense, strict=True):
            getattr(holder, name).weight.copy_(rows)
    folder = tmp_path_factory.mktemp("quantised")
    linears = oracle.linears(reference)
    plans = {
        "all": (3, linears),
        "some": (2, [n for n in linears if n.endswith(("v_proj", "up_proj"))]),
    }
    folders = {
        name: oracle.save_adapter(reference, folder / name, rank=rank, targets=targets, seed=rank)
        for name, (rank, targets) in plans.items()
    }
    return model, oracle.Oracle.of(reference, folders), folders


def test_lora_on_quantised_packed_layers(quantised):
    """The stored numbers are not the weight: the delta must not be scaled as they are."""
    model, cases, folders = quantised
    ids, names = torch.randint(0, 61, (4, 5)), ["all", None, "some", "all"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cm = lorafx.compile(model, folders, options={"lowering": "reference"})
    oracle.assert_close(cm(ids, adapter_names=names), cases.rows(names, {"input_ids": ids}))
    qkv = cm._orig_mod.model.layers[0].self_attn.qkv_proj
    assert isinstance(qkv, QKVParallelLinear)
    assert isinstance(qkv.quant_method, Int8ChannelLinearMethod)
    assert qkv.weight.dtype == torch.int8
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    cm.detach()
