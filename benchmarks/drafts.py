"""Requests whose tokens are guessed ahead, on a CPU: what drafts gain.

A Llama of random weights with two adapters, and a draft of a tenth of its size. Random weights
agree by chance only, so what the draft computes, at its real cost, is replaced by the tokens of the
model, each of which is wrong with 0.3.

    plain     no drafts
    draft     `assistant_model`, of `--guessed` tokens
    lookup    `prompt_lookup_num_tokens`, of which random prompts and their answers give little

    gain = tokens a second of an arm / tokens a second of plain, in one round

    python benchmarks/drafts.py [--hidden 512] [--layers 8] [--rounds 5] [--out results.json]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from protocol import save, save_adapter
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import lorafx
from lorafx.generation.continuous.drafts import Asked, Proposer

VOCABULARY, PROMPT = 4096, 32


class Agreeing(Proposer):
    """Has `draft` compute its guesses, and proposes `answers` (prompt -> tokens) instead."""

    def __init__(self, draft: Proposer, answers: Mapping[Sequence[int], Sequence[int]]) -> None:
        self.draft, self.answers, self.random = draft, answers, random.Random(0)
        self.begin, self.end = draft.begin, draft.end  # type: ignore[method-assign]

    def propose(self, asked: Asked, active: Any) -> Sequence[Sequence[int]]:
        found = []
        for (state, _), guess in zip(asked, self.draft.propose(asked, active), strict=True):
            at, tokens = len(state.generated), self.answers[(*state.initial_tokens,)]
            draft = tokens[at : at + len(guess)]
            found.append([t if self.random.random() < 0.7 else (t + 1) % VOCABULARY for t in draft])
        return found


def build(hidden: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def run(
    cm: Any, arm: Mapping[str, Any], prompts: Sequence[Sequence[int]], new: int, answers: Any
) -> tuple[float, float, dict[Sequence[int], list[int]]]:
    """Tokens a second, the part of guessed tokens that was kept, and the answers."""
    config = ContinuousBatchingConfig(page_size=16, num_blocks=512, max_batch_tokens=512)
    with cm.continuous_batching(None, config, warmup=True, **arm) as engine:
        if "assistant_model" in arm:
            engine.drafts.proposer = Agreeing(engine.drafts.proposer, answers)
        for timed in (False, True):  # the first round makes what a step needs once
            start, ids = time.perf_counter(), []
            with engine.pause():
                for i, prompt in enumerate(prompts):
                    name = (None, "a0", "a1")[i % 3]
                    ids.append(engine.add_request([*prompt], adapter=name, max_new_tokens=new))
            outputs = engine.collected(ids).values()
            seconds = time.perf_counter() - start
            if not timed and engine.drafts is not None:
                engine.drafts.accepted = engine.drafts.proposed = 0
        drafts = engine.drafts
    found = {(*output.prompt_ids,): output.generated_tokens for output in outputs}
    kept = 0.0 if drafts is None else drafts.accepted / max(drafts.proposed, 1)
    return len(prompts) * new / seconds, kept, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"hidden": 512, "layers": 8, "new": 64, "guessed": 4, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model, draft = (
        build(given.hidden, given.layers),
        build(given.hidden // 2, given.layers * 2 // 5),
    )
    sizes = [
        sum(p.numel() for layer in m.model.layers for p in layer.parameters())
        for m in (model, draft)
    ]
    print(f"parameters of the layers: {sizes[0]:,}, of the draft's {sizes[1]:,}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        paths = {
            f"a{i}": save_adapter(model, Path(folder) / f"a{i}", 16, "all-linear", std=0.02, seed=i)
            for i in range(2)
        }
        cm = lorafx.compile(model, paths)
        assistant = lorafx.compile(draft, lorafx.LoraConfig(target_modules=["q_proj"], max_rank=1))
        arms: dict[str, dict[str, Any]] = {
            "plain": {},
            "draft": {"assistant_model": assistant, "num_assistant_tokens": given.guessed},
            "lookup": {"prompt_lookup_num_tokens": given.guessed},
        }
        for count in given.requests:
            rng = random.Random(count)
            prompts = [[rng.randrange(3, VOCABULARY) for _ in range(PROMPT)] for _ in range(count)]
            answers = run(cm, {}, prompts, given.new, None)[2]
            speeds: dict[str, list[float]] = {arm: [] for arm in arms}
            keeps: dict[str, float] = {}
            for number in range(given.rounds):
                for arm in random.Random(number).sample([*arms], len(arms)):
                    speed, keeps[arm], found = run(cm, arms[arm], prompts, given.new, answers)
                    if found != answers:
                        raise RuntimeError(f"{arm} answered otherwise than plain")
                    speeds[arm].append(speed)
            for arm, found_speeds in speeds.items():
                gains = [s / p for s, p in zip(found_speeds, speeds["plain"], strict=True)]
                row = {"requests": count, "arm": arm, "kept": keeps[arm], "gain": gains}
                row["tokens a second"] = statistics.median(found_speeds)
                rows.append(row)
                print(
                    count,
                    arm,
                    f"{row['tokens a second']:.1f} tokens/s, kept {keeps[arm]:.2f},",
                    f"gain {statistics.median(gains):.2f} [{min(gains):.2f}, {max(gains):.2f}]",
                )
    if given.out is not None:
        settings = {k: v for k, v in vars(given).items() if k != "out"}
        save(given.out, f"drafts in the engine, {settings}, parameters {sizes}", rows)


if __name__ == "__main__":
    main()
