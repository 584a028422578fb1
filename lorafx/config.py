"""The configuration: which modules carry LoRA, the room for adapters, and how to compile."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx

from lorafx.errors import ConfigError, Setting, nearest
from lorafx.torch_internals import versions

CACHE = Setting("cache", "Options.cache")

#: When this process imported lorafx.
IMPORTED = time.time()

LoweringName = Literal["auto", "inductor", "triton", "reference"]
#: Strategies of a LoRA node, by lowering; "aten" is the op's own implementation.
STRATEGIES: Mapping[str, tuple[str, ...]] = {
    "inductor": ("generated", "aten"),
    "triton": ("split", "epilogue", "gemv", "segments", "concat", "aten"),
    "reference": ("aten",),
}
#: What fields may be with `batch_invariant`: Inductor's code alone computes each number alike.
_IN_ANY_BATCH: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("lowering", ("auto", "inductor")),
    ("start", ("auto", "compiled")),
    ("base_graphs", ("auto", False)),
)
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
Verify = Literal["lint", "numeric"]
Overflow = Literal["refuse", "waves"]
BaseGraphs = bool | Literal["auto", "warmup"]
Start = Literal["auto", "eager", "compiled"]
Fallback = Literal["eager", "refuse"]
RowDim = int | Literal["items"] | None
DeltaOf = Literal["argument", "weight"]


@dataclass(frozen=True)
class LoraConfig:
    """Which modules may carry LoRA, and how much room adapters get.

    Attributes:
        target_modules: a list of exact or dotted-suffix module names, one regular expression
            (a str, matched by `re.fullmatch` against the module path), "all-linear", or None
            for what the given adapters target ("all-linear" when none are given).
        exclude_modules: the same forms; removed from `target_modules`.
        max_adapters: number of slots on the device: how many adapters can be active in one batch.
        max_rank: largest rank of an adapter that can be loaded.
        slot_rank: the rank that a slot has room for; None for `max_rank`. An adapter of a larger
            rank takes several adjacent slots, and the last slot has room for `max_rank`, so memory
            grows with the rank (docs/adapter_store.md).
        max_host_bytes: bytes that adapters may take in host memory. Beyond them the least recently
            used adapters are dropped, and read again from their files when a call uses them
            (docs/adapter_store.md). None keeps all of them.
        dtype: dtype of the banks; None takes each module's weight dtype.
        row_dims: the dimension that holds the requests, by name of the forward's argument,
            "batch.x" for the item `x` of a dict or dataclass, "batch.0" for one of a list or tuple;
            None for an argument that all requests share, "items" for a list with an item for each
            request. It overrides the table of roles. In models that declare no roles (no
            `main_input_name`), dimension 0 holds the requests of arguments that neither names.
        packed_modules: the modules that a packed one replaces, as in `{"qkv_proj": ["q_proj",
            "k_proj", "v_proj"]}`, one name per output slice, or with slices, `{"in_proj_qkvz":
            {"in_proj_qkv": (0, 1, 2), "in_proj_z": 3}}`. It takes precedence over the model's
            `packed_modules_mapping`.
        use_dora: whether banks have room for DoRA adapters: one scale per output beside the
            factors, applied in every graph with adapters. A DoRA adapter that is given when
            compiling turns it on.
        lora_bias: whether banks have room for biases of linears and convolutions that adapters add
            (PEFT's `lora_bias`) or replace (`bias="lora_only"`, "all"). It is turned on like
            `use_dora`.
        modules_to_save: modules whose whole weight adapters may replace (PEFT's field of the same
            name): paths, or dotted suffixes, of linears, embeddings, or modules that contain some.
            Those of adapters that are given when compiling are added.
        trainable_tokens: how many rows of an embedding an adapter may replace (PEFT's
            trainable_token_indices): a number for the model's input embedding, or numbers by name
            of a module. Heads that are tied to it follow. A linear's rows also hold the numbers of
            what changes its inputs or outputs (OFT, IA³, LoKr). Adapters that are given when
            compiling raise it to their number.
        scaled_pair: A (R, K) and B (N, R), of the largest sizes, whose rows and columns VeRA
            adapters scale where `trainable_tokens` has room for their R + N numbers. Those given
            when compiling set it if `max_rank` has no room for factors.
        max_own_weights: how many adapters with replaced weights, or rows of weights, can be active
            in one batch, each with whole weights on the device. None for `max_adapters`.
    """

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    max_adapters: int = 8
    max_rank: int = 16
    max_host_bytes: int | None = None
    dtype: torch.dtype | None = None
    row_dims: Mapping[str, RowDim] = field(default_factory=dict)
    packed_modules: Mapping[str, Sequence[str] | Mapping[str, int | Sequence[int]]] = field(
        default_factory=dict
    )
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: Sequence[str] = ()
    trainable_tokens: int | Mapping[str, int] = 0
    scaled_pair: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)
    max_own_weights: int | None = None
    slot_rank: int | None = None

    def __post_init__(self) -> None:
        optional = ("max_host_bytes", "slot_rank", "max_own_weights")
        for name in ("max_adapters", "max_rank", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                setting = Setting(name, f"LoraConfig.{name}")
                raise ConfigError(f"{setting} must be a positive integer, got {value!r}").naming(
                    setting
                )
        if self.slot_rank is not None and self.slot_rank > self.max_rank:
            setting = Setting("slot_rank", "LoraConfig.slot_rank")
            raise ConfigError(
                f"{setting} = {self.slot_rank} is over max_rank = {self.max_rank}; give less, or a "
                "larger max_rank"
            ).naming(setting)
        match self.scaled_pair:
            case None:
                pass
            case (Tensor(shape=(r, _)), Tensor(shape=(_, also_r))) if r == also_r:
                pass
            case other:
                items = other if isinstance(other, (list, tuple)) else (other,)
                shapes = " and ".join(str(getattr(t, "shape", type(t).__name__)) for t in items)
                raise ConfigError(
                    f"LoraConfig.scaled_pair must be A (R, K) and B (N, R), got {shapes}"
                )
        saved = self.modules_to_save
        if isinstance(saved, str) or not all(isinstance(name, str) and name for name in saved):
            raise ConfigError(
                f"LoraConfig.modules_to_save must be a list of module names, got {saved!r}"
            )


@dataclass(frozen=True)
class After:
    """A user's pass over each captured graph, for `Options.passes`.

        def count_products(gm, ctx):
            "How many matrix products the graph holds."
            print(len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)))
            return 0

        lorafx.compile(model, options={"passes": {"count": lorafx.After("match", count_products)}})

    Attributes:
        after: the name of the pass that it follows, which may be another pass of the user's;
            "captured" places it before the first pass over the functional ATen graph, and "traced"
            before the first pass over Dynamo's.
        run: `run(gm, ctx) -> int` changes the graph `gm` (a `torch.fx.GraphModule`) in place and
            returns how many edits it made. A new node of an ATen graph needs its fake value in
            `meta["val"]`, as `ctx.call(graph, op, args)` gives it
            (`lorafx.program.context.Context`). As after any pass, dead code is removed and the
            graph is recompiled, verified and dumped. The pass runs for graphs with adapters, not
            for the base's (`Options.base_graphs`), which only passes over Dynamo's graphs see.
    """

    after: str
    run: Callable[[fx.GraphModule, Any], int]


@dataclass(frozen=True)
class Options:
    """How to compile.

    Attributes:
        lowering: "auto" ("triton" on a CUDA or ROCm device, else "inductor"; on a CPU without a
            C++ compiler "reference"), "inductor" (generated C++ on a CPU, else aten, in
            Inductor's code), "triton" (generated Triton in Inductor's code; on a CPU in Triton's
            interpreter, to debug), or "reference" (plain aten, run node by node).
        verify: "lint" (graph structure, shapes, dtypes and sites after each pass), or "numeric"
            (also all that passes promise, and each pass's graph runs beside the proved one on the
            first real inputs).
        passes: by name: graph passes that are switched on or off, `{"pack": False}`, and passes of
            your own, `{"mine": lorafx.After("fuse", run)}`. `print(lorafx.pipeline())` lists them.
        plan: strategies pinned by canonical site path: "generated" for generated C++;
            "split", "epilogue", "gemv", "segments" and "concat" for Triton (docs/kernels.md);
            "aten".
        dump: the folder for the graph after every pass; None reads LORAFX_DUMP.
        recompile_limit: the largest number of graphs of one entry; needing more is an error.
        strict: an adapter whose file lacks factors for a module that its own configuration targets
            is an error, and one with factors that are not used. Otherwise there is one warning, and
            W is kept. Modules that `LoraConfig` does not select do not count.
        delta_of: what an adapter changes at modules whose own forward changes its input before it
            multiplies it by the weight, as in `F.linear(self.norm(x), self.weight)`: "argument"
            adds the delta of the module's argument, x, as PEFT trains it, with one warning, and
            such adapters cannot be merged; "weight" serves W + ΔW. Elsewhere both are the same.
        shortcuts: names of optimisations by private parts of torch that change no result; [] for
            none; None for all that were tested on the installed torch (docs/torch_internals.md).
        cache: a folder where graphs are saved, so that the next process that compiles the same
            model need not trace it; True for one beside the compiled kernels; "auto" for that one
            where it is safe and torch can, with a bounded size (docs/saved_graphs.md); None for
            none. Loading a graph runs code from the folder, so nobody else may have write access
            to it.
        overflow: how a batch with more distinct adapters than slots is treated: "refuse" raises
            CapacityError; with "waves" calls and `generate` run its rows in several batches and
            return the results in the order of the rows (docs/adapter_store.md).
        base_graphs: whether calls without an adapter have separate graphs, which are those of
            `torch.compile(model)`, bit for bit. False: they run the graphs with adapters, so that
            half as many graphs are compiled; results are the base's up to rounding. "warmup": False
            until `warmup` has compiled such graphs, then True. "auto" is False on a CPU, where
            graphs with adapters are as fast if no row has one; "warmup" on a GPU, where the kernel
            of each linear would read the slots of its rows; True with `lowering="reference"`, and
            for models with `nn.MultiheadAttention`, whose fast path cannot apply adapters.
        start: "eager": a call for which no graph is ready is answered at once by the model in
            eager mode, while its graph is compiled in a process beside (docs/first_answer.md);
            "compiled": it waits for its graph. "auto" is LORAFX_START, or else "eager" for models
            on a CPU that no other rank shares.
        fallback: with `start="eager"`, how calls are answered whose graph cannot be compiled
            beside: "eager", with one warning; or "refuse", as by `start="compiled"`, which raises
            where nothing can be compiled.
        mode: a mode of torch.compile, which selects settings of Inductor: "reduce-overhead",
            "max-autotune", "max-autotune-no-cudagraphs"; None, or "default", for none.
        batch_invariant: whether a request has the same bits in any batch; what cannot have them is
            refused (docs/reliability.md). On a CPU, by Inductor.
    """

    lowering: LoweringName = "auto"
    verify: Verify = "lint"
    passes: Mapping[str, bool | After] = field(default_factory=dict)
    plan: Mapping[str, str] = field(default_factory=dict)
    dump: str | None = None
    recompile_limit: int = 64
    strict: bool = False
    delta_of: DeltaOf = "argument"
    shortcuts: Sequence[str] | None = None
    cache: str | bool | None = "auto"
    overflow: Overflow = "refuse"
    base_graphs: BaseGraphs = "auto"
    start: Start = "auto"
    fallback: Fallback = "eager"
    mode: str | None = None
    batch_invariant: bool = False

    @classmethod
    def of(cls, value: Options | Mapping[str, Any] | None) -> Options:
        """`value` as Options; a mapping's keys must be field names."""
        if value is None:
            return cls()
        if isinstance(value, Options):
            return value
        known = [f.name for f in fields(cls)]
        for key in value:
            if key not in known:
                raise ConfigError(
                    f"unknown option {key!r}{nearest(key, known)}; options are {', '.join(known)}"
                )
        return cls(**value)

    def runs(self, name: str) -> bool:
        return bool(self.passes.get(name, True))

    def __post_init__(self) -> None:
        for name, allowed in (
            ("lowering", ("auto", *STRATEGIES)),
            ("verify", ("lint", "numeric")),
            ("overflow", ("refuse", "waves")),
            ("base_graphs", ("auto", True, False, "warmup")),
            ("start", ("auto", "eager", "compiled")),
            ("fallback", ("eager", "refuse")),
            ("delta_of", ("argument", "weight")),
            ("mode", (None, *MODES)),
        ):
            if getattr(self, name) not in allowed:
                setting = Setting(name, f"Options.{name}")
                raise ConfigError(
                    f"{setting} must be one of {', '.join(map(str, allowed))}, "
                    f"got {getattr(self, name)!r}"
                ).naming(setting)
        for name, fitting in _IN_ANY_BATCH if self.batch_invariant else ():
            if getattr(self, name) not in fitting:
                setting = Setting(name, f"Options.{name}")
                raise ConfigError(
                    f"{setting} = {getattr(self, name)!r} does not have the same bits in any "
                    "batch, and batch_invariant asks for it: leave out one of them, on a GPU and "
                    "without a C++ compiler batch_invariant"
                ).naming(setting)
        if self.shortcuts is not None:
            from lorafx.torch_internals.shortcuts import SHORTCUTS

            for name in [self.shortcuts] if isinstance(self.shortcuts, str) else self.shortcuts:
                if name not in SHORTCUTS or name is self.shortcuts:
                    raise ConfigError(
                        f"Options.shortcuts must be a list of {', '.join(SHORTCUTS)}, or None; got "
                        f"{name!r}{nearest(str(name), SHORTCUTS)}"
                    )
        if self.cache and self.cache != "auto" and not versions.saves_graphs():
            raise ConfigError(
                f"{CACHE} needs torch 2.13 or later, and this is {torch.__version__}; leave it out"
            ).naming(CACHE)
        allowed = tuple(dict.fromkeys(itertools.chain(*STRATEGIES.values())))
        if self.lowering != "auto":  # which depends on the device
            allowed = STRATEGIES[self.lowering]
        for path, strategy in self.plan.items():
            if strategy not in allowed:
                raise ConfigError(
                    f"Options.plan[{path!r}] must be one of {', '.join(allowed)} for lowering "
                    f"{self.lowering!r}, got {strategy!r}"
                )


def dump_folder(options: Options) -> Path | None:
    """The folder of dumps: `Options.dump`, else LORAFX_DUMP, else None."""
    folder = options.dump or os.environ.get("LORAFX_DUMP")
    return Path(folder) if folder else None
