"""A mixture-of-experts model: LoRA on routed experts, routers and attention, an adapter a row.

python examples/experts.py

The adapters are PEFT's: `target_parameters` names the fused weights of the experts and the
router's, which are parameters, not modules. PEFT itself serves one such adapter a batch.
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lorafx

CONFIG = Qwen3MoeConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS = {
    "experts": LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS),
    "all": LoraConfig(
        r=2,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=[*EXPERTS, "mlp.gate.weight"],
    ),
}


def base() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(CONFIG).eval()


def save_adapter(config: LoraConfig, folder: Path) -> str:
    """An adapter with random factors, where training would have left its own."""
    model = get_peft_model(base(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return str(folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: save_adapter(c, Path(scratch, name)) for name, c in TARGETS.items()}
        cm = lorafx.compile(base(), folders)
    names = ["experts", None, "all"]
    batch = torch.arange(24).reshape(3, 8)
    with torch.no_grad():
        mixed = cm(input_ids=batch, adapter_names=names).logits
        for row, name in enumerate(names):
            alone = cm(input_ids=batch[row : row + 1], adapter_names=[name]).logits[0]
            same = torch.allclose(mixed[row], alone, atol=1e-5)
            print(f"{name or 'base'}: {'as when served alone' if same else 'DIFFERENT'}")
    print(*(line for line in str(cm.explain()).splitlines() if "experts" in line), sep="\n")


if __name__ == "__main__":
    main()
