"""A Llama on a CPU by lorafx, llama.cpp, OpenVINO and torch.compile, by turns in one run.

Hidden 1024, intermediate 2816, 6 layers, a vocabulary of 4096; or, with `--model 1b`, the shape of
Llama 3.2 1B with a vocabulary of 32,000. No cache, LoRA of rank 16 on all linears. Weights in
float32 and bfloat16, and of 8 and 4 bits: torchao's Int8WeightOnlyConfig and llama.cpp's Q8_0,
torchao's PrototypeInt4WeightOnlyConfig (groups of 32) and Q4_0. Time over llama.cpp without an
adapter, and beside it the time in which this machine reads all weights once:

    python benchmarks/cpu_peers.py [--quick] [--model small|1b] [--weights fp32|bf16|8|4]
                                   [--rows 1 8] [--length 1 128]

llama.cpp has one adapter for all rows. Without one of the other libraries its arms are left out.
Prompts are measured with dense weights and the most rows, since OpenVINO is what they are for.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib.util
import itertools
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cpu_mixed import RANK, build_model, save_adapters
from protocol import machine, rows_of, save, timed
from safetensors.torch import load_file
from torch import Tensor, nn

import lorafx


class Shape(NamedTuple):
    """Of a model: its name, layers, and what it has else than `build_model`'s."""

    name: str
    layers: int
    changes: dict[str, int]


LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32_000}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
MODELS = {
    "small": Shape("Llama 1024/2816 of 6 layers", 6, {}),
    "1b": Shape("Llama 2048/8192 of 16 layers", 16, {**LARGE, **HEADS}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8": torch.bfloat16, "4": torch.bfloat16}
DENSE = ("fp32", "bf16")
GGUF_TYPES = {"fp32": "F32", "bf16": "BF16", "8": "Q8_0", "4": "Q4_0"}
#: llama.cpp's names of a Llama's modules.
NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"{part}_proj": f"attn_{part}" for part in "qkv"},
    "o_proj": "attn_output",
    **{f"{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


def quantised(model: nn.Module, weights: str) -> nn.Module:
    import torchao.quantization as ao
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    configs = {
        "8": ao.Int8WeightOnlyConfig(set_inductor_config=False),
        "4": PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False),
    }
    # The placement of weights in memory matters more than much of what is compared.
    shared = {} if weights in configs else {id(p): p for p in model.parameters()}
    model = copy.deepcopy(model, shared)
    if weights in configs:
        ao.quantize_(model, configs[weights])
    return model


def gguf_name(path: str) -> str:
    *parents, last = path.split(".")
    block = next((f"blk.{part}." for part in parents if part.isdecimal()), "")
    return block + NAMES[last]


def write_gguf(model: Any, path: Path, weights: str) -> None:
    import gguf

    config, kind = model.config, gguf.GGMLQuantizationType[GGUF_TYPES[weights]]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in model.state_dict().items():
        value = tensor.float().numpy()
        chosen = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(value, chosen)
        target = f"{gguf_name(name.removesuffix('.weight'))}.weight"
        writer.add_tensor(target, data, raw_dtype=chosen)
    _finish(writer)


def write_adapter(folder: str, path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for name, tensor in load_file(f"{folder}/adapter_model.safetensors").items():
        module, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        target = f"{gguf_name(module)}.weight.lora_{factor.lower()}"
        writer.add_tensor(target, tensor.float().numpy())
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model in a context of its own, which computes all logits of `ids` in each call; its cache
    has `room` for more tokens."""

    def __init__(
        self, model: Path, ids: Tensor, adapter: Path | None = None, room: int = 0
    ) -> None:
        import llama_cpp as library

        self.library, (rows, length) = library, ids.shape
        settings = library.llama_model_default_params()
        self.model = library.llama_model_load_from_file(str(model).encode(), settings)
        context = library.llama_context_default_params()
        context.n_batch = context.n_ubatch = max(64, rows * length)
        context.n_ctx = max(64, rows * length + room)
        context.n_seq_max = rows
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        context.no_perf, context.kv_unified = True, True
        self.context = library.llama_init_from_model(self.model, context)
        if adapter is not None:
            loaded = library.llama_adapter_lora_init(self.model, str(adapter).encode())
            adapters = (library.llama_adapter_lora_p_ctypes * 1)(loaded)
            scales = (ctypes.c_float * 1)(1.0)
            assert library.llama_set_adapters_lora(self.context, adapters, 1, scales) == 0
        self.batch, self.count = library.llama_batch_init(rows * length, 0, rows), rows * length
        self.batch.n_tokens = self.count
        for i, (row, position) in enumerate(itertools.product(range(rows), range(length))):
            self.batch.token[i], self.batch.pos[i] = int(ids[row, position]), position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0], self.batch.logits[i] = 1, row, True

    def __call__(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)
        assert self.library.llama_decode(self.context, self.batch) == 0
        self.library.llama_synchronize(self.context)

    def logits(self, columns: int) -> Tensor:
        found = self.library.llama_get_logits(self.context)
        values = (ctypes.c_float * (self.count * columns)).from_address(
            ctypes.addressof(found.contents)
        )
        return torch.frombuffer(values, dtype=torch.float32).view(self.count, columns).clone()


def by_openvino(model: nn.Module, ids: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    import openvino

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model).float()

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    hint = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    settings = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    converted = openvino.convert_model(Logits(), example_input=ids)
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    request, given = compiled.create_infer_request(), ids.numpy()
    return lambda: request.infer([given])


def memory_speed() -> float:
    """Bytes a second that all threads read from memory."""
    buffer = torch.ones(1 << 27)
    return buffer.nbytes / min(timed(buffer.sum, 0.1) for _ in range(8))


def bits_of(weights: str) -> float:
    return {"fp32": 32, "bf16": 16, "8": 8, "4": 5}[weights]


def run_case(
    shape: Shape, weights: str, rows: int, length: int, blocks: int, seconds: float, folder: Path
) -> list[dict[str, object]]:
    dtype = DTYPES[weights]
    model = build_model(shape.layers, dtype, **shape.changes)
    ids = torch.randint(0, model.config.vocab_size, (rows, length))
    paths = save_adapters(model, folder)
    names = [name for name, _ in zip(itertools.cycle(paths), ids, strict=False)]
    torch._dynamo.reset()
    cm = lorafx.compile(quantised(model, weights), dict(paths), options={"start": "compiled"})
    base = torch.compile(quantised(model, weights))

    def serve(adapters: list[str | None]) -> Callable[[], Any]:
        return lambda: cm(input_ids=ids, use_cache=False, adapter_names=adapters)

    arms: dict[str, Callable[[], Any]] = {"lorafx D=0": serve([None] * rows)}
    arms["lorafx D=1"] = serve(["a0"] * rows)
    if rows > 1:
        arms[f"lorafx D={rows}"] = serve(list(names))
    arms["torch.compile"] = lambda: base(input_ids=ids, use_cache=False)
    first = arms["torch.compile"]
    if importlib.util.find_spec("llama_cpp"):
        write_gguf(model, folder / "model.gguf", weights)
        write_adapter(paths["a0"], folder / "adapter.gguf")
        first = LlamaCpp(folder / "model.gguf", ids)
        first()
        if length == 1:  # with more, its heads are in another order
            want = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
            got = first.logits(model.config.vocab_size)
            difference = (got - want).norm() / want.norm()
            # The errors of layers add up like random steps.
            most = (0.4 if weights == "4" else 0.2) * max(1, shape.layers / 6) ** 0.5
            assert difference <= most, f"llama.cpp is {difference} off"
        arms["llama.cpp, LoRA"] = LlamaCpp(folder / "model.gguf", ids, folder / "adapter.gguf")
    if importlib.util.find_spec("openvino") and weights in DENSE:
        arms["OpenVINO"] = by_openvino(model, ids, dtype)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    speed = memory_speed()
    floor = 1e3 * matrices * bits_of(weights) / 8 / speed
    label = f"[{rows}, {length}], weights {weights}"
    print(f"\n{label}: W read once in {floor:.2f} ms, at {speed / 1e9:.1f} GB/s")
    extra = {"read_once_milliseconds": floor, "gigabytes_per_second": speed / 1e9}
    return [row | extra for row in rows_of(label, first, arms, blocks=blocks, seconds=seconds)]


def machine_and_peers() -> dict[str, object]:
    peers = ("torchao", "llama_cpp_python", "openvino")
    found = {name for item in metadata.distributions() if (name := item.metadata["Name"])}
    known = {name.replace("-", "_").lower(): name for name in found}
    return machine() | {p: metadata.version(known[p]) for p in peers if p in known}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 layers, 5 blocks; nothing saved")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--weights", choices=DTYPES, action="append")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    blocks, seconds = (5, 0.02) if options.quick else (20, 0.1)
    shape = MODELS[options.model]
    if options.quick:
        shape = shape._replace(layers=2)
    name = "cpu_peers" if options.model == "small" else f"cpu_peers_{options.model}"
    out = options.out or Path(f"benchmarks/results/{name}.json")
    rows, title = [], f"time over llama.cpp, {shape.name}, r=16"
    cases = itertools.product(options.weights or DTYPES, options.length, options.rows)
    with torch.no_grad():
        for weights, length, count in cases:
            if length > 1 and (count < max(options.rows) or weights not in DENSE):
                continue
            with tempfile.TemporaryDirectory() as folder:
                given = (shape, weights, count, length, blocks, seconds)
                rows += run_case(*given, Path(folder))
            if not options.quick:
                save(out, title, rows, machine_and_peers)


if __name__ == "__main__":
    main()
