"""Any nn.Module: two PEFT adapters on disk, one batch in which each row has its own, or none.

python examples/plain_module.py
"""

import copy
import tempfile

import peft
import torch
from torch import nn

import lorafx

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 8)).eval()
x = torch.randn(3, 24)

with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
    alone = {None: model(x)}
    for name, rank in (("small", 2), ("large", 7)):
        config = peft.LoraConfig(r=rank, target_modules=["0", "2"], init_lora_weights=False)
        trained = peft.get_peft_model(copy.deepcopy(model), config)  # stands for a training run
        trained.save_pretrained(f"{folder}/{name}")
        alone[name] = trained(x)

    cm = lorafx.compile(model, {name: f"{folder}/{name}" for name in ("small", "large")})
    names = ["large", None, "small"]
    y = cm(x, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(y[row], alone[name][row])
        print(f"row {row}: {name or 'base'}: as when served alone")
