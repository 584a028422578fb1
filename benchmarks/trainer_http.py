"""A trainer that samples from `lorafx serve` in another process: each step is pushed over HTTP.

A Llama of hidden size 1024 and 6 layers in float32 with one adapter of rank 16 on all its linears.
A step trains on the samples before (REINFORCE; the reward is the share of a completion's tokens
that are of the first quarter of the vocabulary), sends the adapter as a body of safetensors in the
place of the last version, and samples with log-probabilities, eight completions of 32 tokens for
each of four prompts. All log-probabilities are compared with those of the trainer's own forward.
At the end the base weights are sent as well. Seconds are medians without the first step.

    python benchmarks/trainer_http.py [--steps N] [--out FILE]

Trainer and server share the cores of one machine, by turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from protocol import machine, save
from safetensors.torch import save as as_bytes
from server_load import Server
from trl_steps import GENERATIONS, NEW, PROMPTS, llama, reward, tokenizer

LENGTH, BINARY = 12, "application/octet-stream"


def post(url: str, content: bytes, kind: str) -> Any:
    request = urllib.request.Request(url, content, {"content-type": kind})
    with urllib.request.urlopen(request) as answer:
        text = answer.read()
        return json.loads(text) if text.startswith(b"{") else answer.headers


def adapter_bytes(model: Any, config: LoraConfig) -> bytes:
    """The adapter as one file, with its configuration among the metadata."""
    state = {
        name.replace(".default", ""): tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if "lora_" in name
    }
    fields = {**config.to_dict(), "target_modules": sorted(config.target_modules or ())}
    return as_bytes(state, {"adapter_config": json.dumps(fields, default=str)})


def loop(server: Server, model: Any, base: bytes, steps: int) -> dict[str, object]:
    config = model.peft_config["default"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    prompts = torch.randint(2, 256, (PROMPTS, LENGTH)).tolist()
    seconds: dict[str, list[float]] = {"train": [], "push": [], "sample": []}
    rewards, differences, versions = [], [], []

    def timed(name: str, action: Callable[..., Any], *given: Any) -> Any:
        begin = time.perf_counter()
        result = action(*given)
        seconds[name].append(time.perf_counter() - begin)
        return result

    def own_logprobs(ids: torch.Tensor) -> torch.Tensor:
        scores = model(input_ids=ids).logits[:, LENGTH - 1 : -1].log_softmax(-1)
        return scores.gather(2, ids[:, LENGTH:, None])[..., 0]

    def train(ids: torch.Tensor, gains: torch.Tensor) -> None:
        (-gains[:, None] * own_logprobs(ids)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for step in range(steps):
        content = adapter_bytes(model, config)
        query = f"lora_name=policy&load_inplace={'true' if step else 'false'}"
        path = f"{server.url}/v1/load_lora_adapter?{query}"
        sent = timed("push", post, path, content, BINARY)
        body = {"model": "policy", "prompt": prompts, "n": GENERATIONS, "max_tokens": NEW}
        body |= {"temperature": 1.0, "seed": step, "ignore_eos": True, "return_token_ids": True}
        asked = json.dumps({**body, "logprobs": 0}).encode()
        answer = timed("sample", post, f"{server.url}/v1/completions", asked, "application/json")
        versions.append(answer["adapter_version"])
        assert versions[-1] == int(sent["x-adapter-version"])
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        tokens = [choice["token_ids"] for choice in choices]
        given = torch.tensor([choice["logprobs"]["token_logprobs"] for choice in choices])
        whole = [prompts[row // GENERATIONS] + new for row, new in enumerate(tokens)]
        ids = torch.tensor(whole)
        with torch.no_grad():
            differences.append(float((own_logprobs(ids) - given).abs().max()))
        found = torch.tensor(reward(tokens)).view(PROMPTS, GENERATIONS)
        rewards.append(float(found.mean()))
        gains = (found - found.mean(1, keepdim=True)).div(found.std(1, keepdim=True) + 1e-4)
        timed("train", train, ids, gains.flatten())
    assert versions == sorted(set(versions))
    seconds["base_push"] = []
    timed("base_push", post, f"{server.url}/update_weights", base, BINARY)
    return {
        "case": "fp32",
        "steps": steps,
        **{f"{name}_s": median(values[1:] or values) for name, values in seconds.items()},
        "first_push_s": seconds["push"][0],
        "adapter_bytes": len(content),
        "tokens": PROMPTS * GENERATIONS * NEW,
        "largest_difference_of_logprobs": max(differences),
        "rewards": rewards,
        "base_bytes": len(base),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trainer_http.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model = llama(hidden_size=1024, intermediate_size=2816, num_attention_heads=16)
    with tempfile.TemporaryDirectory() as folder:
        base, adapters = Path(folder) / "base", Path(folder) / "adapters"
        adapters.mkdir()
        model.save_pretrained(base)
        tokenizer().save_pretrained(base)
        weights = (base / "model.safetensors").read_bytes()
        policy = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        with Server(base, adapters, "--allow-control", "--max-rank", "16") as server:
            rows = [loop(server, policy, weights, options.steps)]
    print({name: value for name, value in rows[0].items() if name != "rewards"})
    save(options.out, "a trainer that pushes adapters to lorafx serve and samples", rows, machine)


if __name__ == "__main__":
    main()
