"""One small Llama, four adapters in one batch, then a fifth: what `make demo` shows, and checks.

    python examples/demo.py            # a CPU, about two minutes, nothing downloaded

The model and the adapters are in demo_model/ and demo_adapters/ (train_demo.py made them). All are
given the same prompts, `word>`: the base answers with the word's length, each adapter does
something else. The demo exits with status 1 when a row's text is not what its adapter should say,
when a base row differs from the base model alone, or when swapping an adapter compiles anything.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import lorafx

HERE = Path(__file__).resolve().parent
MODEL, ADAPTERS = HERE / "demo_model", HERE / "demo_adapters"
DUMPS = os.environ.get("LORAFX_DUMP", "dumps/demo")
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
NEW_TOKENS = 10
BASE = "(base)"
# How to start a server of the same model, and ask it.
SERVE = (
    f"{os.path.relpath(Path(sys.executable).with_name('lorafx'))} serve examples/demo_model "
    "--adapters examples/demo_adapters, and from another terminal "
    "curl localhost:8000/v1/completions -H 'Content-Type: application/json' "
    """-d '{"model": "demo_model:reverse", "prompt": "compiler>"}'"""
)
ROT13 = str.maketrans("abcdefghijklmnopqrstuvwxyz", "nopqrstuvwxyzabcdefghijklm")
# What a prompt's answer should be, worked out without any model.
EXPECTED: dict[str, Callable[[str], str]] = {
    BASE: lambda word: str(len(word)),
    "copy": str,
    "reverse": lambda word: word[::-1],
    "upper": str.upper,
    "consonants": lambda word: "".join(c for c in word if c not in "aeiou"),
    "rot13": lambda word: word.translate(ROT13),
}

# Plain text, and wide enough for module paths, when the output is not a terminal.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
failures: list[str] = []


def heading(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left", characters="=")


def check(ok: bool, text: str) -> None:
    console.print(f"{'[green]ok[/]  ' if ok else '[red]FAIL[/]'} {text}")
    if not ok:
        failures.append(text)


def load_base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL).eval()


def encode(words: list[str]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left: ids and mask (rows, width) int64."""
    return dict(TOKENIZER([f"{word}>" for word in words], padding=True, return_tensors="pt"))


def decode(tokens: torch.Tensor, prompts: dict[str, torch.Tensor]) -> list[str]:
    """Each row's answer: what follows its prompt, up to the newline."""
    answers = tokens[:, prompts["input_ids"].shape[1] :]
    return [text.split("\n")[0] for text in TOKENIZER.batch_decode(answers)]


def generate(model: torch.nn.Module, prompts: dict[str, torch.Tensor], **more: object) -> Any:
    return model.generate(**prompts, max_new_tokens=NEW_TOKENS, do_sample=False, **more)


def show_rows(cm: torch.nn.Module, base: torch.nn.Module, rows: list[tuple[str, str]]) -> None:
    """Run (adapter, word) rows as one batch, print and check every row."""
    words = [word for _, word in rows]
    names = [None if adapter == BASE else adapter for adapter, _ in rows]
    prompts = encode(words)
    keep = {"return_dict_in_generate": True, "output_logits": True}
    mixed = generate(cm, prompts, adapter_names=names, **keep)
    alone = generate(base, prompts, **keep)
    said, said_alone = decode(mixed.sequences, prompts), decode(alone.sequences, prompts)
    table = Table("row", "adapter", "prompt", "answer", "base model alone")
    for row, ((adapter, word), text) in enumerate(zip(rows, said, strict=True)):
        table.add_row(str(row), adapter, f"{word}>", text, said_alone[row])
    console.print(table)
    wrong = [
        f"{adapter} said {text!r} to {word!r}"
        for (adapter, word), text in zip(rows, said, strict=True)
        if text != EXPECTED[adapter](word)
    ]
    check(not wrong, "; ".join(wrong) or f"{len(rows)} rows, each did its own adapter's task")
    base_rows = [i for i, name in enumerate(names) if name is None]
    check(
        all(said[i] == said_alone[i] for i in base_rows),
        "base rows say what the base model says alone",
    )
    steps = min(len(mixed.logits), len(alone.logits))  # the base alone may be done sooner
    gap = max(
        (mixed.logits[i][base_rows] - alone.logits[i][base_rows]).abs().max().item()
        for i in range(steps)
    )
    check(gap < 1e-4, f"base rows' logits are the base model's (largest difference {gap:.1e})")


def time_arms(
    arms: dict[str, Callable[[], object]], *, rounds: int = 20, budget: float = 30.0
) -> dict[str, list[float]]:
    """Seconds a call, arms interleaved in random order so that a busy machine slows all alike.

    On a machine so busy that `rounds` would take longer than `budget` seconds: at least five.
    """
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for run in arms.values():
        run()  # compiles what is not compiled yet
        run()
    ending = time.perf_counter() + budget
    for done in range(rounds):
        if done >= 5 and time.perf_counter() > ending:
            break
        for name in rng.sample(list(arms), len(arms)):
            started = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def show_times(cm: torch.nn.Module, loaded: dict[str, str], rows: list[tuple[str, str]]) -> None:
    """The same batch through lorafx, PEFT's mixed batch and the base model without adapters."""
    compiled_base = load_base()
    compiled_base.forward = torch.compile(compiled_base.forward, dynamic=True)
    first, *rest = loaded.items()
    mixed = peft.PeftModel.from_pretrained(load_base(), first[1], adapter_name=first[0]).eval()
    for name, folder in rest:
        mixed.load_adapter(folder, adapter_name=name)
    prompts = encode([word for _, word in rows])
    names = [None if adapter == BASE else adapter for adapter, _ in rows]
    peft_names = [name or "__base__" for name in names]
    base_arm, our_arm, peft_arm = "base, torch.compile", "lorafx, mixed batch", "PEFT, mixed batch"

    fixed = {"min_new_tokens": NEW_TOKENS}  # every arm takes as many steps
    seconds = time_arms(
        {
            base_arm: lambda: generate(compiled_base, prompts, **fixed, disable_compile=True),
            our_arm: lambda: generate(cm, prompts, **fixed, adapter_names=names),
            peft_arm: lambda: generate(mixed, prompts, **fixed, adapter_names=peft_names),
        }
    )
    table = Table(f"generate: {len(rows)} rows, {NEW_TOKENS} tokens each", "median ms", "over base")
    for name, values in seconds.items():
        ratio = statistics.median(v / b for v, b in zip(values, seconds[base_arm], strict=True))
        table.add_row(name, f"{1e3 * statistics.median(values):.1f}", f"{ratio:.2f}")
    console.print(table)
    console.print(
        "A model this small spends its time outside its matrices; benchmarks/ has larger ones."
    )


def main() -> int:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # transformers' own deprecations, met through PEFT
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    started = time.perf_counter()
    names = ["copy", "reverse", "upper", "consonants"]
    loaded = {name: str(ADAPTERS / name) for name in names}

    heading("compile")
    config = lorafx.LoraConfig(
        target_modules=[
            *("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj", "lm_head"),
        ],
        max_adapters=4,
        max_rank=16,
    )
    cm = lorafx.compile(load_base(), config, adapters=loaded, options={"dump": DUMPS})
    base = load_base()
    console.print(
        f"{sum(p.numel() for p in base.parameters()):,} weights; adapters: {', '.join(names)}"
    )

    heading("one batch, every row with its own adapter")
    words = {
        BASE: ["compiler", "mask"],
        "copy": ["kernel", "graph"],
        "reverse": ["tensor", "later"],
        "upper": ["fusion", "rank"],
        "consonants": ["adapter", "python"],
    }
    rows = [(adapter, word) for adapter, pair in words.items() for word in pair]
    show_rows(cm, base, rows)

    heading("sites, packs and plan")
    console.print(str(cm.explain()), markup=False, soft_wrap=True)

    heading("another adapter in copy's place, and another batch size")
    before = cm.recompiles
    cm.unload_adapter("copy")
    cm.load_adapter(str(ADAPTERS / "rot13"), "rot13")
    owners = ["rot13", "rot13", "rot13", BASE, "upper", "reverse", "consonants"]
    others = ["secret", "uryyb", "model", "secret", "secret", "secret", "secret"]
    show_rows(cm, base, list(zip(owners, others, strict=True)))
    check(
        cm.recompiles == before, f"graphs compiled: {before} before the swap, {cm.recompiles} after"
    )

    heading("time")
    loaded = {name: str(ADAPTERS / name) for name in ("rot13", *names[1:])}
    show_times(cm, loaded, [("rot13" if owner == "copy" else owner, word) for owner, word in rows])

    heading("dumps")
    files = sorted(path for path in Path(DUMPS).rglob("*") if path.is_file())
    console.print(
        f"{len(files)} files in {DUMPS}: each pass's graph, before and after", soft_wrap=True
    )
    check(bool(files), "every pass was dumped")

    heading("serve it")
    console.print(SERVE, markup=False, soft_wrap=True)

    console.print(f"\n{time.perf_counter() - started:.0f} s")
    if failures:
        console.print(f"[red]{len(failures)} checks failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
