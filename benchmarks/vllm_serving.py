"""vLLM's own engine on a CPU, as an arm of serving.py and vllm_lora.py.

It runs in a Python of its own, since vLLM pins its dependencies; `make vllm` makes one:

    python benchmarks/serving.py --vllm-python .venv-vllm/bin/python

`Peer` starts it; each line of JSON that goes in is the work of one round, and each that comes out
its outcome. vLLM serves its own Llama, from a checkpoint, with its own scheduler. OpenMP and the
allocator that vLLM's documentation recommends are preloaded where they are found.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any


class Peer:
    """The process of vLLM, idle between rounds.

    Args:
        python: a Python that has vLLM.
        model: a checkpoint's folder.
        adapters: name → a folder that PEFT saved; without any, vLLM's LoRA is off.
        dtype: of the model.
        lorafx: whether lorafx computes LoRA, for which that Python needs lorafx.
        sizes: `rank` of the adapters, `most_requests` and `most_tokens` of a step, and the `length`
            of the longest sequence.
    """

    def __init__(
        self,
        python: Path,
        model: Path,
        adapters: dict[str, str],
        *,
        dtype: str = "float32",
        lorafx: bool = False,
        **sizes: int,
    ) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {
            "LORAFX_VLLM": "on" if lorafx else "off",
            "LD_PRELOAD": ":".join(preloaded(python)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        self._process = subprocess.Popen(
            [
                str(python),
                __file__,
                json.dumps({"model": str(model), "adapters": adapters, "dtype": dtype} | sizes),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def run(self, requests: Sequence[dict[str, Any]], new: int) -> dict[str, Any]:
        """The "seconds" that all took and those of all "steps", the median of the seconds to a
        "first" token, and the "tokens" of each request.

        Args:
            requests: of each its token ids "prompt", when it "arrives" (seconds), and its
                "adapter", a name or None.
            new: tokens that are generated for each.
        """
        work = json.dumps({"requests": list(requests), "new": new})
        print(work, file=self._process.stdin, flush=True)
        outcome: dict[str, Any] = self._answer()
        return outcome

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM's process ended with {self._process.wait()}; see its output")
        return json.loads(line)


def preloaded(python: Path) -> list[str]:
    """The libraries that vLLM wants loaded before any other, of those that are there."""
    own = python.absolute().parent.parent / "lib" / "libiomp5.so"
    allocator = ctypes.util.find_library("tcmalloc_minimal")
    return [str(own)] * own.exists() + ([allocator] if allocator else [])


def main(given: dict[str, Any], answers: IO[str]) -> None:
    from vllm import EngineArgs, LLMEngine
    from vllm.lora.request import LoRARequest

    loras = {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(given["adapters"].items(), 1)
    }
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=given["model"],
            skip_tokenizer_init=True,
            dtype=given["dtype"],
            **({"enable_lora": True, "max_loras": len(loras)} if loras else {}),
            max_lora_rank=given["rank"],
            max_num_seqs=given["most_requests"],
            max_num_batched_tokens=given["most_tokens"],
            max_model_len=given["length"],
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
    )
    for lora in loras.values():
        engine.add_lora(lora)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        print(json.dumps(run(engine, loras, **work)), file=answers, flush=True)


def run(
    engine: Any, loras: dict[str, Any], requests: list[dict[str, Any]], new: int
) -> dict[str, Any]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    waiting = list(enumerate(requests))
    added: dict[str, float] = {}
    first: dict[str, float] = {}
    tokens: dict[str, list[int]] = {}
    steps: list[float] = []
    while waiting or engine.has_unfinished_requests():
        while waiting and time.perf_counter() - started >= waiting[0][1]["arrives"]:
            number, request = waiting.pop(0)
            lora = loras[request["adapter"]] if request["adapter"] else None
            prompt = {"prompt_token_ids": request["prompt"]}
            added[str(number)] = time.perf_counter()
            engine.add_request(str(number), prompt, greedy, lora_request=lora)
        if not engine.has_unfinished_requests():
            time.sleep(0.001)
            continue
        began = time.perf_counter()
        outputs = engine.step()
        steps.append(time.perf_counter() - began)
        for output in outputs:
            name, made = output.request_id, list(output.outputs[0].token_ids)
            if made and name not in first:
                first[name] = time.perf_counter() - added[name]
            if output.finished:
                tokens[name] = made
    return {
        "seconds": time.perf_counter() - started,
        "steps": steps,
        "first": statistics.median(first.values()),
        "tokens": [tokens[str(number)] for number in range(len(requests))],
    }


if __name__ == "__main__":
    # vLLM logs on its standard output, which goes where errors go; answers have theirs.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        main(json.loads(sys.argv[1]), answers)
