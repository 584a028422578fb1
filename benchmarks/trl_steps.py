"""GRPO of TRL on a small Llama: steps, rollouts and rewards by who samples.

transformers' generate, its paged engine and `lorafx.Rollout` train the same random model with the
same seeds, each in a process of its own. The reward is the share of a completion's tokens that are
of the first quarter of the vocabulary, 0.25 at the start. Seconds are medians of the last half of
the steps, when lorafx's graphs are there; the first step is beside them, and the reward of every
step by its seed. The two engines have caches of the same size. With lorafx, every tenth step
compares the log-probabilities of the tokens with those of the trainer's own forward, outside of
what is timed.

    python benchmarks/trl_steps.py                   some minutes on two cores, with the extra `trl`
    python benchmarks/trl_steps.py --seeds 2 3 4     adds the rewards of further seeds, and the CPU
                                                     time of the first one by one thread
    python benchmarks/trl_steps.py --memory          adds what a sampler takes beside 1.1 GB

    peak    how far the largest resident memory of the process is above that before the sampler,
            less banks, adapters on the host and the cache of keys and values, over the weights. The
            same calls of a small model, which load what they need of torch, come first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from protocol import in_process, machine, save

VOCABULARY, PROMPTS, GENERATIONS, NEW = 256, 4, 8, 32
#: Pages for the longest prompts with their completions, for both engines.
CACHE = {"page_size": 16, "num_blocks": 3 * PROMPTS * GENERATIONS, "max_batch_tokens": 1024}
PAGED = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": CACHE,
}
#: Arguments of GRPOConfig, and whether lorafx samples.
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "transformers' generate": ({}, False),
    "transformers' paged engine": (PAGED, False),
    "lorafx": (PAGED, True),
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{number}" for number in range(VOCABULARY - 2))]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token < VOCABULARY // 4 for token in ids) / len(ids) for ids in completion_ids]


def llama(**sizes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**{**small, **sizes}, **ids))


def train(arm: str, steps: int, seed: int) -> dict[str, Any]:
    """Train in this process."""
    import peft
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import lorafx

    settings, by_lorafx = ARMS[arm]
    torch.manual_seed(0)
    model = llama()
    texts = [" ".join(f"w{(7 * row + 3 * i) % 250}" for i in range(12)) for row in range(32)]
    names = ("step", "rollout", "step_cpu", "rollout_cpu")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    checks, differences = [0.0, 0.0], []

    def clocks() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def note(name: str, begin: tuple[float, float], without: Sequence[float] = (0, 0)) -> None:
        for suffix, start, end, left in zip(("", "_cpu"), begin, clocks(), without, strict=True):
            seconds[name + suffix].append(end - start - left)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            checks[:], self.begin = (0.0, 0.0), clocks()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            note("step", self.begin, checks)

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(
                **{"output_dir": folder, "report_to": [], "save_strategy": "no", "use_cpu": True},
                **{"per_device_train_batch_size": PROMPTS * GENERATIONS, "bf16": False},
                **{"num_generations": GENERATIONS, "max_completion_length": NEW},
                **{"max_steps": steps, "logging_steps": 1, "learning_rate": 5e-3},
                **{"lr_scheduler_type": "constant", "gradient_checkpointing": False},
                **{"disable_tqdm": True, "seed": seed, **settings},
            ),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer(),
            peft_config=peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            rollout_func=lorafx.Rollout() if by_lorafx else None,
            callbacks=[Clock()],
        )
        generate = trainer._generate

        def timed(prompts: list[Any]) -> Any:
            begin = clocks()
            output = generate(prompts)
            note("rollout", begin)
            prompt_ids, tokens, logprobs = output[0], output[1], output[4]
            if by_lorafx and len(seconds["rollout"]) % 10 == 1:
                begin = clocks()
                differences.extend(map(difference, prompt_ids, tokens, logprobs))
                checks[:] = [end - start for start, end in zip(begin, clocks(), strict=True)]
            return output

        def difference(prompt: list[int], tokens: list[int], logprobs: list[float]) -> float:
            ids = torch.tensor([[*prompt, *tokens]])
            with torch.no_grad():
                own = trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids, torch.ones_like(ids), len(tokens)
                )[0]
            return float((own[0] - torch.tensor(logprobs)).abs().max())

        trainer._generate = timed
        trainer.train()
    half = steps // 2
    sampler = trainer.rollout_func.sampler if by_lorafx else None
    return {
        "first_step_s": seconds["step"][0],
        **{f"{name}_s": median(values[half:]) for name, values in seconds.items()},
        "steps": steps,
        "rewards": {seed: [g["reward"] for g in trainer.state.log_history if "reward" in g]},
        "largest_difference_of_logprobs": max(differences, default=None),
        "graphs": None if sampler is None else sampler.recompiles,
    }


def memory() -> dict[str, Any]:
    """What a sampler takes in this process beside a model of 1.1 GB that is trained."""
    import peft
    from transformers import ContinuousBatchingConfig

    import lorafx

    def resident(line: str) -> int:
        status = Path("/proc/self/status").read_text()
        found = [row for row in status.splitlines() if row.startswith(line)]
        return int(found[0].split()[1]) << 10

    lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    row: dict[str, Any] = {}
    for sizes in (
        {},
        {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16},
    ):
        model = peft.get_peft_model(llama(**sizes), lora).train()
        weights = sum(parameter.nbytes for parameter in model.parameters())
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # begins the largest one anew
        sampler = lorafx.sampler(model)
        for batch in range(3):
            if batch == 2:
                sampler.wait()  # for the graphs, which a process beside compiles
            sampler.sync()
            sampler.generate_batch(
                [[5, 6, 7, 8]] * PROMPTS,
                continuous_batching_config=ContinuousBatchingConfig(**CACHE),
                max_new_tokens=NEW,
                return_logprobs=True,
            )
        shape = sampler._orig_mod.config
        features = shape.num_key_value_heads * (shape.hidden_size // shape.num_attention_heads)
        tokens = CACHE["page_size"] * CACHE["num_blocks"]
        cache = 2 * 4 * shape.num_hidden_layers * features * tokens
        row = {"case": "memory", "weights": weights, "cache": cache, **sampler.memory()}
        row["above"] = resident("VmHWM") - before
        row["peak"] = (row["above"] - row["banks"] - row["host"] - cache) / weights
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trl_steps.json"))
    options = parser.parse_args()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    seeds = options.seeds or [1]
    cases = {}
    if options.out.exists():  # of which what is not measured now stays
        cases = {row["case"]: row for row in json.loads(options.out.read_text())["rows"]}
    if options.memory:
        cases["memory"] = in_process(__file__, "memory")
    for arm in () if options.memory else ARMS:
        row = cases.setdefault(arm, {"rewards": {}})
        for seed in seeds:
            threads = {"OMP_NUM_THREADS": "1"} if options.seeds else {}
            found = in_process(__file__, "train", arm, options.steps, seed, **threads)
            rewards = row["rewards"] | found["rewards"]
            cpu = {name: found[name] for name in ("step_cpu_s", "rollout_cpu_s")}
            kept = {"one_thread": cpu | row.get("one_thread", {})} if options.seeds else found
            row |= {"case": arm, **kept, "rewards": rewards}
        last = [mean(rewards[-10:]) for rewards in row["rewards"].values()]
        row["last_ten_rewards"] = mean(last)
        if len(last) > 1:
            row["standard_error"] = stdev(last) / math.sqrt(len(last))
        print({name: value for name, value in row.items() if name != "rewards"}, flush=True)
    versions = {name: metadata.version(name) for name in ("trl", "accelerate")}
    title = "GRPO of TRL, sampled by transformers and by lorafx"
    save(options.out, title, [*cases.values()], lambda: {**machine(), **versions})


if __name__ == "__main__":
    main()
