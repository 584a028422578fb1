"""Base weights that change while adapters are served, and an adapter merged for good.

python examples/live_update.py

A trainer pushes new base weights into the running model (`load_weights`): in place, nothing is
compiled again, adapters stay. `merge` gives one adapter the base's speed, `unmerge` takes it back,
`export_merged` writes a checkpoint for `from_pretrained`.
"""

import copy
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorafx

HERE = Path(__file__).resolve().parent


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(HERE / "demo_model")
    model = AutoModelForCausalLM.from_pretrained(HERE / "demo_model").eval()
    trainer = copy.deepcopy(model)  # stands for a training run
    cm = lorafx.compile(model, {"reverse": HERE / "demo_adapters" / "reverse"})

    names = [None, "reverse"]
    prompts = tokenizer(["compiler>"] * len(names), return_tensors="pt")

    def logits(served: torch.nn.Module, names: list[str | None]) -> torch.Tensor:
        with torch.no_grad():
            return served(**prompts, adapter_names=names).logits[:, -1]

    before = logits(cm, names)

    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.mul_(1.01)
    wrapped = ((f"base_model.model.{name}", w) for name, w in trainer.state_dict().items())
    update = cm.load_weights(wrapped)  # names as a PEFT trainer has them
    after = logits(cm, names)
    with torch.no_grad():
        same = torch.allclose(after[0], trainer(**prompts).logits[0, -1], atol=1e-4)
    print(f"{len(update.loaded)} tensors updated")
    print(f"base row: {'as the trained model gives' if same else 'DIFFERENT'}")
    print(f"reverse row moved by {float((after[1] - before[1]).abs().max()):.3f}")

    cm.merge("reverse")
    merged = logits(cm, ["reverse", "reverse"])
    print(f"merged: off by {float((merged[1] - after[1]).abs().max()):.1e}")
    cm.unmerge()
    print(f"unmerged: {'bit-equal' if torch.equal(logits(cm, names), after) else 'DIFFERENT'}")

    with tempfile.TemporaryDirectory() as folder:
        cm.export_merged("reverse", folder)
        exported = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            off = (exported(**prompts).logits[1, -1] - after[1]).abs().max()
    print(f"exported: off by {float(off):.1e}")


if __name__ == "__main__":
    main()
