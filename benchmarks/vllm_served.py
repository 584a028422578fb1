"""vLLM's server on a CPU, with lorafx's LoRA, its own and none, asked by openai's client.

The Llama of cpu_mixed.py in float32, eight adapters of rank 16. 64 requests with prompts of 8 to 64
tokens arrive at once, by turns for the base and for each adapter, and each gets 32 tokens.

    tokens      how many requests, of those compared, have the tokens of dense merge
    seconds     until all 64 have their answers, over those of the server without LoRA, by rounds
    floor       the bytes that a step reads with all adapters, over those without

    make vllm
    python benchmarks/vllm_served.py --python .venv-vllm/bin/python [--rounds N]

Servers run by turns on two cores, all started; only one of them is asked at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cpu_mixed import ADAPTERS, RANK, build_model, save_adapters
from openai import AsyncOpenAI
from peft import PeftModel
from protocol import save
from transformers import LlamaForCausalLM
from vllm_lora import floor, machine_of, work
from vllm_serving import preloaded

OUT = Path("benchmarks/results/vllm_served.json")
NEW = 32
#: Requests whose tokens are compared with dense merge, of each model.
COMPARED = 2


class Server:
    """`vllm serve`, whose command asks for a distribution named vllm, which that for CPUs is not;
    the module that it runs asks for none."""

    def __init__(self, python: Path, model: Path, adapters: Mapping[str, str], mode: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "base", "--port", str(self.port), "--dtype", "float32"]
        command += ["--skip-tokenizer-init", "--max-model-len", "320", "--max-num-seqs", "64"]
        command += ["--max-num-batched-tokens", "2048", "--no-enable-prefix-caching"]
        if adapters:
            command += ["--enable-lora", "--max-loras", str(len(adapters)), "--lora-modules"]
            command += [f"{name}={path}" for name, path in adapters.items()]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {
            "LORAFX_VLLM": mode,
            "LD_PRELOAD": ":".join(preloaded(python)),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        self.process = subprocess.Popen(command, env=environment)
        self.client = AsyncOpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=600
        )

    def wait(self) -> None:
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health")
                return
            except OSError:
                time.sleep(0.5)

    async def ask(self, request: Mapping[str, Any], plain: bool) -> list[int]:
        answer = await self.client.completions.create(
            model="base" if plain or request["adapter"] is None else request["adapter"],
            prompt=request["prompt"],
            max_tokens=NEW,
            temperature=0.0,
            extra_body={"ignore_eos": True, "return_token_ids": True, "detokenize": False},
        )
        return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]

    def run(
        self, requests: Sequence[Mapping[str, Any]], plain: bool
    ) -> tuple[float, list[list[int]]]:
        """Seconds for all requests at once, and their tokens; `plain`: all for the base."""

        async def all_of_them() -> list[list[int]]:
            return await asyncio.gather(*(self.ask(request, plain) for request in requests))

        start = time.perf_counter()
        tokens = LOOP.run_until_complete(all_of_them())
        return time.perf_counter() - start, tokens

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


LOOP = asyncio.new_event_loop()


def mixed(count: int) -> list[dict[str, Any]]:
    """By turns for the base and each adapter."""
    requests, _ = work(count, 0, 0, NEW)
    for row, request in enumerate(requests):
        turn = row % (ADAPTERS + 1)
        request["adapter"] = f"a{turn - 1}" if turn else None
    return requests


def expected(model: Path, paths: Mapping[str, str], request: Mapping[str, Any]) -> list[int]:
    merged = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    if request["adapter"] is not None:
        merged = PeftModel.from_pretrained(merged, paths[request["adapter"]]).merge_and_unload()
    ids = torch.tensor([request["prompt"]])
    made = merged.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return made[0, ids.shape[1] :].tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="one that has vLLM and lorafx")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    model, requests = build_model(6, torch.float32), mixed(64)
    compared = requests[: COMPARED * (ADAPTERS + 1)]
    servers: dict[str, Server] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "model")
        model.save_pretrained(base)
        paths = save_adapters(model, Path(folder), ADAPTERS)
        want = [expected(base, paths, request) for request in compared]
        try:
            for name, adapters, mode in (
                ("no LoRA", {}, "off"),
                ("lorafx", paths, "on"),
                ("vLLM", paths, "off"),
            ):
                servers[name] = Server(given.python, base, adapters, mode)
                servers[name].wait()
            right = {}
            for name in ("lorafx", "vLLM"):
                _, tokens = servers[name].run(requests, plain=False)
                right[name] = sum(a == b for a, b in zip(tokens, want, strict=False))
            servers["no LoRA"].run(requests, plain=True)
            print("servers have started", file=sys.stderr, flush=True)
            seconds: dict[str, list[float]] = {name: [] for name in servers}
            draw = random.Random(0)
            for _ in range(given.rounds):
                for name in draw.sample(list(servers), len(servers)):
                    plain = name == "no LoRA"
                    seconds[name].append(servers[name].run(requests, plain)[0])
        finally:
            for server in servers.values():
                server.close()
    rows = []
    for name, found in seconds.items():
        ratios = [own / plain for own, plain in zip(found, seconds["no LoRA"], strict=True)]
        rows.append(
            {
                "server": name,
                "tokens of dense merge": f"{right[name]} of {len(want)}" if name in right else None,
                "seconds": [round(value, 2) for value in found],
                "over no LoRA, by rounds": [round(ratio, 3) for ratio in ratios],
                "throughput kept": round(1 / statistics.median(ratios), 3),
                "floor": round(floor(model, ADAPTERS), 3) if name in right else 1.0,
            }
        )
        print(rows[-1])
    title = f"64 requests to vLLM's server, {NEW} tokens each, {ADAPTERS} adapters of rank {RANK}"
    save(given.out, title, rows, lambda: machine_of(given.python))


if __name__ == "__main__":
    main()
