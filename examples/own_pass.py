"""A pass of your own among lorafx's: what LoRA adds to the work of each graph.

python examples/own_pass.py
"""

import copy
import tempfile

import peft
import torch
from torch import fx, nn

import lorafx
from lorafx.op_arguments import bound
from lorafx.program.context import Context

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default)


def count_work(gm: fx.GraphModule, ctx: Context) -> int:
    """How many multiplications a row takes in the base's products, and at most in the sites'."""
    base = 0
    for product in PRODUCTS:
        for node in gm.graph.find_nodes(op="call_function", target=product):
            inputs, outputs = bound(node)["mat2"].meta["val"].shape
            base += inputs * outputs
    rank = ctx.program.config.max_rank
    sites = [state.site for states in ctx.states.values() for state in states]
    added = sum(rank * (site.in_features + site.out_features) for site in sites)
    print(f"{len(sites)} sites: {base} multiplications a row, LoRA adds up to {added}")
    return 0  # nothing was edited


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 8)).eval()
x = torch.randn(3, 24)

with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
    trained = peft.get_peft_model(copy.deepcopy(model), config)  # stands for a training run
    trained.save_pretrained(folder)
    alone = {None: model(x), "own": trained(x)}

    options = lorafx.Options(passes={"count_work": lorafx.After("match", count_work)})
    print(lorafx.pipeline(options))
    cm = lorafx.compile(model, adapters={"own": folder}, options=options)
    names = ["own", None, "own"]
    y = cm(x, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(y[row], alone[name][row])
        print(f"row {row}: {name or 'base'}: as when served alone")
