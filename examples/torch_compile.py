"""`torch.compile(model, backend="lorafx")`: for programs that compile their models themselves.

Three ways to say what the LoRA is, one result: a marked model, an option of torch.compile, and a
PEFT model whose adapters are taken over.
"""

from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorafx

HERE = Path(__file__).resolve().parent
FOLDER = str(HERE / "demo_model")
ADAPTERS = {name: str(HERE / "demo_adapters" / name) for name in ("reverse", "upper")}
NAMES = [None, "reverse", "upper"]  # None: the base model
PROMPT = "compiler>"


def load() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def answers(model: torch.nn.Module, rows: int) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    prompts = tokenizer([PROMPT] * rows, return_tensors="pt")
    tokens = model.generate(**prompts, max_new_tokens=12, do_sample=False)
    return [text.split("\n")[0] for text in tokenizer.batch_decode(tokens)]


def marked() -> list[str]:
    """`lorafx.attach` marks the model; the block says whose row each one is. Outside of blocks
    `compiled` is the base, as torch.compile makes it."""
    model = lorafx.attach(load(), ADAPTERS)
    compiled = torch.compile(model, backend="lorafx", dynamic=True)
    with torch.no_grad(), lorafx.adapters(model, NAMES):
        return answers(compiled, len(NAMES))


def by_options() -> list[str]:
    """The model is marked when its first frame is captured."""
    model = load()
    options = {"lora_config": lorafx.LoraConfig(max_adapters=4), "adapters": ADAPTERS}
    model.forward = torch.compile(model.forward, backend="lorafx", dynamic=True, options=options)
    with torch.no_grad(), lorafx.adapters(model, NAMES):
        return answers(model, len(NAMES))


def peft_model() -> list[str]:
    """`lorafx.attach` takes the adapters over; `wrapped` raises until `lorafx.detach(model)`."""
    wrapped = peft.PeftModel.from_pretrained(load(), ADAPTERS["reverse"], adapter_name="reverse")
    wrapped.load_adapter(ADAPTERS["upper"], "upper")
    model = lorafx.attach(wrapped.eval())
    with torch.no_grad(), lorafx.adapters(model, NAMES):
        return answers(model, len(NAMES))


if __name__ == "__main__":
    for road in (marked, by_options, peft_model):
        for name, text in zip(NAMES, road(), strict=True):
            print(f"{road.__name__}, {name or 'base'}: {text}")
