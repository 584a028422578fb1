"""A freshly trained adapter from a trainer's process into a server beside it, by several roads.

The adapter has rank 16 on all linears of Llama-3-8B's shapes: 448 factors, 42 million numbers, in
float32 as PEFT keeps them. The base weights have the shapes alone, since none is read. A sync is
all from the trainer's parameters to the answer that the adapter is served, in the place of the last
version:

    folder    PEFT's save_pretrained into a folder on the disk, which the request names
    file      safetensors' save_file, in the server's bfloat16, into /dev/shm; the request names it
    wide      the same in float32
    body      the state dict as the body of the request, in float32
    before    folder, with a server that runs another checkout (--before)

A ratio is that to `folder` (A/A), of turns in one run, with both processes on the same cores.
`write_ms` and `load_ms` are the trainer's part and the request's, as medians.

    python benchmarks/adapter_sync.py [--layers N] [--blocks N] [--before CHECKOUT] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from protocol import rows_of, save
from safetensors.torch import save as as_bytes
from safetensors.torch import save_file
from trainer_http import BINARY, post
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx

TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
RANK, LOAD = 16, "/v1/load_lora_adapter"


def hollow(layers: int) -> LlamaForCausalLM:
    """Llama-3-8B's modules, each of whose weights is one number in memory."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    number = torch.zeros((), dtype=torch.bfloat16)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            parameter = torch.nn.Parameter(number.expand(weight.shape), requires_grad=False)
            module.register_parameter(name, parameter)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros(buffer.shape))
    return model


def serve(layers: int) -> None:
    """The routes of `lorafx serve`, without an engine, on a port that is printed."""
    import uvicorn

    from lorafx.integrations.server.generating import ServedModel
    from lorafx.integrations.server.routes import build_app
    from lorafx.integrations.server.settings import Settings

    own = lorafx.LoraConfig(target_modules=TARGETS, max_adapters=2, max_rank=RANK)
    compiled = lorafx.compile(hollow(layers), own, options={"start": "eager"})
    allowed: dict[str, Any] = {"allow_runtime_loading": True, "allow_control": True}
    settings = Settings(model="llama", adapter_root=Path("/"), port=0, **allowed)
    served: Any = ServedModel(compiled, None, None, settings)  # type: ignore[arg-type]
    with settings.bind() as listener:
        listener.listen()
        print(listener.getsockname()[1], flush=True)
        config = uvicorn.Config(build_app(served), log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def server(layers: int, checkout: Path) -> Iterator[str]:
    """The address of a server that runs a checkout's lorafx."""
    command = [sys.executable, __file__, "--serve", "--layers", str(layers)]
    variables = os.environ | {"PYTHONPATH": str(checkout)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}{LOAD}"
    finally:
        process.terminate()
        process.wait()


class Trainer:
    """A policy whose adapter is synced; `seconds` has those of each road's two parts."""

    def __init__(self, layers: int, disk: Path, shared: Path) -> None:
        config = LoraConfig(r=RANK, target_modules=TARGETS)
        self.policy: Any = get_peft_model(hollow(layers), config)
        for name, parameter in self.policy.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        self.folder, self.shared = disk / "policy", shared / "policy.safetensors"
        self.policy.save_pretrained(self.folder)
        fields = (self.folder / "adapter_config.json").read_text()
        self.metadata = {"adapter_config": fields}
        self.seconds: dict[str, list[tuple[float, float]]] = {}

    def in_folder(self) -> Path:
        self.policy.save_pretrained(self.folder)
        return self.folder

    def in_file(self, dtype: torch.dtype) -> Path:
        tensors = get_peft_model_state_dict(self.policy)
        save_file({k: t.to(dtype) for k, t in tensors.items()}, self.shared, self.metadata)
        return self.shared

    def in_body(self) -> bytes:
        return as_bytes(get_peft_model_state_dict(self.policy), self.metadata)

    def road(self, name: str, url: str, write: Callable[[], Path | bytes]) -> Callable[[], None]:
        times = self.seconds[name] = []

        def sync() -> None:
            begin = time.perf_counter()
            written = write()
            middle = time.perf_counter()
            if isinstance(written, bytes):
                post(f"{url}?lora_name=policy&load_inplace=true", written, BINARY)
            else:
                body = {"lora_name": "policy", "lora_path": str(written), "load_inplace": True}
                post(url, json.dumps(body).encode(), "application/json")
            times.append((middle - begin, time.perf_counter() - middle))

        return sync


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true")
    given = parser.parse_args()
    if given.serve:
        serve(given.layers)
        return
    with ExitStack() as stack:
        folders = [tempfile.TemporaryDirectory(dir=dir) for dir in (None, "/dev/shm")]
        disk, shared = (Path(stack.enter_context(folder)) for folder in folders)
        url = stack.enter_context(server(given.layers, Path(__file__).parents[1]))
        trainer = Trainer(given.layers, disk, shared)
        base = trainer.road("A/A", url, trainer.in_folder)
        arms = {
            "file": trainer.road("file", url, lambda: trainer.in_file(torch.bfloat16)),
            "wide": trainer.road("wide", url, lambda: trainer.in_file(torch.float32)),
            "body": trainer.road("body", url, trainer.in_body),
        }
        if given.before:
            old = stack.enter_context(server(given.layers, given.before.absolute()))
            arms["before"] = trainer.road("before", old, trainer.in_folder)
        rows = rows_of("llama-3-8b", base, arms, blocks=given.blocks, seconds=0, itself="A/A")
    for row in rows:
        parts = zip(*trainer.seconds[row["arm"]], strict=True)
        row["write_ms"], row["load_ms"] = (1e3 * statistics.median(part) for part in parts)
    print(*rows, sep="\n")
    if given.out:
        save(given.out, "an adapter from a trainer into a server beside it", rows)


if __name__ == "__main__":
    main()
