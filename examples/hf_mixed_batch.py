"""A Hugging Face causal LM and adapters from folders: one `generate` call, an adapter a row.

python examples/hf_mixed_batch.py                              # the demo's small model
python examples/hf_mixed_batch.py MODEL sql=FOLDER chat=FOLDER  # yours
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import lorafx

HERE = Path(__file__).resolve().parent
PROMPT = "compiler>"


def main(folder: str, adapters: dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    cm = lorafx.compile(model, adapters)  # adapters: name -> PEFT folder

    names = [None, *adapters]  # None: the base model
    prompts = tokenizer([PROMPT] * len(names), return_tensors="pt")
    tokens = cm.generate(**prompts, adapter_names=names, max_new_tokens=12, do_sample=False)
    for name, text in zip(names, tokenizer.batch_decode(tokens), strict=True):
        print(f"{name or 'base'}: {text.split(chr(10))[0]}")


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1], dict(pair.split("=", 1) for pair in sys.argv[2:]))
    else:
        saved = sorted((HERE / "demo_adapters").iterdir())
        main(str(HERE / "demo_model"), {path.name: str(path) for path in saved})
