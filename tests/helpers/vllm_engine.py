"""vLLM's engine in a process, which tests ask; and tiny models with adapters of unequal ranks.

The process serves one model. Adapters are named by their folders, and loaded when a request names
them. A request may arrive at a later step, and adapters may be loaded and unloaded between steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 320
RANKS = (4, 8, 16, 3, 1, 12, 7, 5)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Of the adapters in turn: all linears; the ends of the model too; parts of packed layers alone.
TARGETS = (
    LINEARS,
    (*LINEARS, "embed_tokens", "lm_head"),
    ("q_proj", "v_proj", "up_proj"),
    ("embed_tokens", "k_proj", "down_proj"),
)


class VllmEngine:
    """The process. `arguments` are those of vLLM's EngineArgs; tokens are greedy."""

    def __init__(
        self, model: Path, *, environment: Mapping[str, str] | None = None, **arguments: Any
    ) -> None:
        settings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({"model": str(model)} | arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | settings | dict(environment or {}),
        )
        self.started = self._answer()

    def ask(self, **work: Any) -> Any:
        """The answer to a method of the process's `Worker`, or its error as a string."""
        assert self._process.stdin is not None
        print(json.dumps(work), file=self._process.stdin, flush=True)
        return self._answer()

    def run(
        self,
        requests: Sequence[tuple[Sequence[int], Path | None]],
        new: int = 8,
        at: Sequence[int] = (),
        events: Sequence[tuple[int, str, Path]] = (),
    ) -> list[list[int]]:
        """The tokens of each (prompt, adapter). Request j arrives at step `at[j]`, or at once; an
        event (step, "load" or "unload", adapter) comes before that step."""
        found = self.ask(
            do="run",
            requests=[(list(prompt), folder and str(folder)) for prompt, folder in requests],
            new=new,
            at=list(at) or [0] * len(requests),
            events=[(step, do, str(folder)) for step, do, folder in events],
        )
        assert isinstance(found, list), found
        return found

    def classify(
        self, requests: Sequence[tuple[Sequence[int], Path | None]], task: str = "classify"
    ) -> list[list[Any]]:
        """The logits of each (prompt, adapter), or of its tokens, all in one batch."""
        found = self.ask(
            do="classify",
            task=task,
            requests=[(list(prompt), folder and str(folder)) for prompt, folder in requests],
        )
        assert isinstance(found, list), found
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine ended with {self._process.wait()}")
        return json.loads(line)


@dataclass
class Served:
    """A model on disk with adapters, and what it has to answer."""

    model: Path
    adapters: list[Path]

    def merged(self, adapter: Path | None) -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        if adapter is None:
            return model
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()

    def expected(
        self, requests: Sequence[tuple[Sequence[int], Path | None]], new: int = 8
    ) -> list[list[int]]:
        """Greedy tokens of dense merge in float32."""
        found = []
        for prompt, adapter in requests:
            ids = torch.tensor([list(prompt)])
            made = self.merged(adapter).generate(
                ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            found.append(made[0, len(prompt) :].tolist())
        return found

    def distance(self, prompt: Sequence[int], adapter: Path | None, made: Sequence[int]) -> float:
        """By how much the largest logit exceeds that of the token that was made, at most."""
        ids = torch.tensor([[*prompt, *made]])
        with torch.no_grad():
            logits = self.merged(adapter)(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(made).unsqueeze(-1)).squeeze(-1)
        return float((logits.amax(-1) - chosen).max())


def tiny_llama(folder: Path, adapters: int) -> Served:
    """A Llama whose tokens depend on each adapter, and adapters by turns of RANKS and TARGETS."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    randomise(model, 0.08)
    model.save_pretrained(folder / "model")
    paths = []
    for index in range(adapters):
        rank = RANKS[index % len(RANKS)]
        lora = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS[index % len(TARGETS)])
        )
        wrapped = get_peft_model(
            LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), lora
        )
        randomise(wrapped, 0.15, only="lora_")
        paths.append(folder / f"a{index}")
        wrapped.save_pretrained(str(paths[-1]), save_embedding_layers=False)
    return Served(folder / "model", paths)


def randomise(model: nn.Module, std: float, only: str = "") -> None:
    for name, parameter in model.named_parameters():
        if only in name and parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)


def prompts(count: int, longest: int = 40, seed: int = 1) -> list[list[int]]:
    """Of different lengths; no two share a beginning."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [3 + (11 * i) % (longest - 2) for i in range(count)]
    return [torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]


class Worker:
    """The engine of the process."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import EngineArgs, LLMEngine

        defaults = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enable_lora": True,
            "max_lora_rank": 16,
            "max_model_len": 256,
            "disable_log_stats": True,
            "enable_prefix_caching": False,
        }
        self.engine = LLMEngine.from_engine_args(EngineArgs(**(defaults | arguments)))
        self.numbers: dict[str, int] = {}

    def request(self, folder: str) -> Any:
        from vllm.lora.request import LoRARequest

        number = self.numbers.setdefault(folder, len(self.numbers) + 1)
        return LoRARequest(Path(folder).name, number, folder)

    def mode(self) -> str:
        """How vLLM compiles the model."""
        return str(self.engine.vllm_config.compilation_config.mode.name)

    def load(self, folder: str) -> bool:
        return bool(self.engine.add_lora(self.request(folder)))

    def unload(self, folder: str) -> bool:
        return bool(self.engine.remove_lora(self.numbers[folder]))

    def run(
        self,
        requests: list[tuple[list[int], str | None]],
        new: int,
        at: list[int],
        events: list[tuple[int, str, str]],
    ) -> list[list[int]]:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        tokens: dict[str, list[int]] = {}
        step, waiting = 0, sorted(range(len(requests)), key=lambda j: at[j])
        while waiting or self.engine.has_unfinished_requests():
            for _, do, folder in (event for event in events if event[0] == step):
                getattr(self, do)(folder)
            while waiting and at[waiting[0]] <= step:
                number = waiting.pop(0)
                prompt, folder = requests[number]
                self.engine.add_request(
                    *(str(number), {"prompt_token_ids": prompt}, greedy),
                    lora_request=None if folder is None else self.request(folder),
                )
            for output in self.engine.step():
                if output.finished:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
        return [tokens[str(number)] for number in range(len(requests))]

    def classify(self, requests: list[tuple[list[int], str | None]], task: str) -> list[list[Any]]:
        from vllm import PoolingParams

        for number, (prompt, folder) in enumerate(requests):
            self.engine.add_request(
                *(str(number), {"prompt_token_ids": prompt}),
                PoolingParams(task=task, use_activation=False),
                lora_request=None if folder is None else self.request(folder),
            )
        logits: dict[str, list[float]] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    logits[output.request_id] = output.outputs.data.tolist()
        return [logits[str(number)] for number in range(len(requests))]


def main(arguments: dict[str, Any], answers: IO[str]) -> None:
    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    worker = Worker(arguments)
    answer("started")
    for line in sys.stdin:
        work = json.loads(line)
        try:
            answer(getattr(worker, work.pop("do"))(**work))
        except Exception as error:
            answer(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    # vLLM logs on its standard output, which goes where errors go; answers have theirs.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        main(json.loads(sys.argv[1]), out)
