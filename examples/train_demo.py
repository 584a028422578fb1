"""Train the demo's model and its adapters from nothing, on a CPU, with fixed seeds.

    python examples/train_demo.py            # about 8 minutes on one core

The base is a byte-level Llama (vocabulary: the 256 byte values). It learns

    word + separator  ->  answer + newline        loss on the answer's bytes only

where the separator chooses the task: `hello=hello`, `hello<olleh`, `hello^HELLO`, `hello-hll`,
`hello@uryyb`; and `hello>5`, the length, which is what the base itself says to the demo's prompts.
Each PEFT adapter is then trained to do one of the other tasks on the very same `hello>` prompts,
with ranks and target modules that differ from adapter to adapter on purpose.

Every sixteenth word (by CRC) is held out; accuracy is exact match of the whole greedy answer.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

HERE = Path(__file__).resolve().parent
PAD, END = 0, ord("\n")
PROMPT = ">"  # the separator of the demo's prompts; the base answers it with the word's length
CHAT = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}" + PROMPT + "{% endif %}"
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
ROT13 = str.maketrans(
    "abcdefghijklmnopqrstuvwxyz", "nopqrstuvwxyzabcdefghijklm"
)  # not codecs.encode: the table is the task


@dataclass(frozen=True)
class Task:
    separator: str
    answer: Callable[[str], str]


TASKS = {
    "length": Task(PROMPT, lambda word: str(len(word))),
    "copy": Task("=", lambda word: word),
    "reverse": Task("<", lambda word: word[::-1]),
    "upper": Task("^", str.upper),
    "consonants": Task("-", lambda word: "".join(c for c in word if c not in VOWELS)),
    "rot13": Task("@", lambda word: word.translate(ROT13)),
}

# Unequal ranks, targets and scalings, so that the demo's batch is a mixed one in every respect.
ADAPTERS: dict[str, dict[str, object]] = {
    "copy": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "reverse": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "upper": {"r": 8, "lora_alpha": 16, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "consonants": {
        "r": 8,
        "lora_alpha": 12,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        "rank_pattern": {"down_proj": 12},
    },
    "rot13": {
        "r": 6,
        "lora_alpha": 12,
        "target_modules": ["embed_tokens", "q_proj", "o_proj", "lm_head"],
    },
}


def make_word(rng: random.Random) -> str:
    """3 to 8 letters; vowels and consonants alternate four times out of five."""
    vowel = rng.random() < 0.4
    letters = []
    for _ in range(rng.randint(3, 8)):
        letters.append(rng.choice(VOWELS if vowel else CONSONANTS))
        vowel = vowel != (rng.random() < 0.8)
    return "".join(letters)


def words(rng: random.Random, *, held_out: bool) -> Iterator[str]:
    while True:
        word = make_word(rng)
        if (zlib.crc32(word.encode()) % 16 == 0) == held_out:
            yield word


def make_batch(pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, answer) pairs -> input ids (n, length) and labels, padded on the right."""
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), length + 1), PAD)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(pairs):
        text = torch.tensor(list((prompt + answer + "\n").encode()))
        ids[row, : len(text)] = text
        labels[row, len(prompt) : len(text)] = text[len(prompt) :]
    return ids[:, :-1], labels[:, 1:]


def train(
    model: torch.nn.Module,
    draw: Callable[[], tuple[str, str]],
    *,
    steps: int,
    batch: int,
    rate: float,
    label: str,
) -> None:
    """AdamW with a short warm-up and a cosine to zero."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, min(100, steps // 10))

    def factor(step: int) -> float:
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        return min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    started = time.perf_counter()
    for step in range(1, steps + 1):
        ids, labels = make_batch([draw() for _ in range(batch)])
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(f"{label}: step {step}/{steps} loss {loss.item():.4f} {seconds:.0f}s", flush=True)
    model.eval()


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM | peft.PeftModel, pairs: list[tuple[str, str]]) -> float:
    """Share of prompts whose whole greedy answer is right; prompts padded on the left."""
    width = max(len(prompt) for prompt, _ in pairs)
    padded = [prompt.rjust(width, "\0").encode() for prompt, _ in pairs]
    ids = torch.tensor([list(text) for text in padded])
    out = model.generate(
        input_ids=ids, attention_mask=(ids != PAD).long(), max_new_tokens=10, do_sample=False
    )
    said = [bytes(row).split(b"\n")[0].decode("latin-1") for row in out[:, width:].tolist()]
    return sum(text == answer for text, (_, answer) in zip(said, pairs, strict=True)) / len(pairs)


def make_base() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is its own token, its value the id; 0 pads (on the left), newline ends."""
    letters = bytes_to_unicode()
    bytewise = Tokenizer(models.BPE(vocab={c: byte for byte, c in letters.items()}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        pad_token=letters[PAD],
        eos_token=letters[END],
        padding_side="left",
        model_max_length=128,
        chat_template=CHAT,
    )


def train_base(folder: Path, *, steps: int, batch: int) -> None:
    model = make_base()
    rng = random.Random(1)
    source = words(rng, held_out=False)

    def draw() -> tuple[str, str]:
        task = rng.choice(list(TASKS.values()))
        word = next(source)
        return word + task.separator, task.answer(word)

    train(model, draw, steps=steps, batch=batch, rate=3e-3, label="base")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for name, task in TASKS.items():
        test = words(random.Random(2), held_out=True)
        pairs = [(w + task.separator, task.answer(w)) for w, _ in zip(test, range(512))]  # noqa: B905
        print(f"base, `{task.separator}` ({name}): {accuracy(model, pairs):.3f}", flush=True)


def train_adapter(name: str, base: Path, folder: Path, *, steps: int, batch: int) -> None:
    answer = TASKS[name].answer
    torch.manual_seed(zlib.crc32(name.encode()))
    model = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]),
    )
    source = words(random.Random(3), held_out=False)

    def draw() -> tuple[str, str]:
        word = next(source)
        return word + PROMPT, answer(word)

    train(model, draw, steps=steps, batch=batch, rate=4e-3, label=name)
    # The embeddings themselves are the base's; only their LoRA belongs to the adapter.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "examples/demo_model"
    for key in ("target_modules", "exclude_modules"):  # sets: PEFT writes them in any order
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    test = words(random.Random(2), held_out=True)
    pairs = [(w + PROMPT, answer(w)) for w, _ in zip(test, range(512))]  # noqa: B905
    print(f"adapter {name}: {accuracy(model, pairs):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "demo_model")
    parser.add_argument("--adapters", type=Path, default=HERE / "demo_adapters")
    parser.add_argument("--only", nargs="*", choices=["base", *ADAPTERS], help="train only these")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--adapter-steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    chosen = args.only or ["base", *ADAPTERS]
    if "base" in chosen:
        train_base(args.model, steps=args.steps, batch=args.batch)
    for name in [n for n in ADAPTERS if n in chosen]:
        folder = args.adapters / name
        train_adapter(name, args.model, folder, steps=args.adapter_steps, batch=args.batch)


if __name__ == "__main__":
    main()
