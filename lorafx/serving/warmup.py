"""Warm-up: the graphs that serving needs, captured before the first request.

    calls = {forward, generate} × batch sizes × lengths × {no adapter, one adapter, a mix}
    graphs = {batch 1, more} × {one token, more} × {cache form} × {no adapter, adapters}, of which
        some are one (lorafx.capture.instances, `Options.base_graphs`)

Where an aLoRA adapter is loaded there is one more call of each, for the graphs of several tokens
that have one slot per token.

A graph does not depend on which adapters a batch has, so dummies stand in for all of them. They go
through the store into the banks as adapters do, with one pair of factors for each part of each
site. The store, the batch, random states and the buffers of the model are restored whatever
happens.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorafx.adapter_store.adapter import Adapter, LoraWeights
from lorafx.errors import BatchError, CapacityError, ConfigError, ProvenanceError, some
from lorafx.model.sites import Site
from lorafx.progress import progress
from lorafx.serving.alora import any_begins
from lorafx.serving.example_inputs import Example, decode_step, derived_example, given_examples
from lorafx.session.session import Session

if TYPE_CHECKING:
    from lorafx.serving.compiled import CompiledModel

#: Rank of the dummies, where that many fit and no sharding asks for more. What is compiled does not
#: depend on it; a small one costs little memory.
DEFAULT_RANK = 8
#: New tokens of a `generate` call: one of the prefill, and two decode steps.
NEW_TOKENS = 3
#: The dummy that begins at a token.
_BEGINS = "warm-up aLoRA"

NameList = list["str | None"]


@dataclass(frozen=True)
class WarmupPlan:
    """What is run.

    Attributes:
        examples: calls of the model's own forward, and prompts.
        batch_sizes, lengths: each example is also run with these many requests and tokens.
        forward: whether forward is run by itself.
        generate: keyword arguments of `generate`; None where it is not run.
    """

    examples: tuple[Example, ...]
    batch_sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    forward: bool
    generate: Mapping[str, Any] | None


def warm_up(
    compiled: CompiledModel,
    example_inputs: Any,
    *,
    rank: int | None,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    generate: bool | Mapping[str, Any] | None,
) -> None:
    """See `CompiledModel.warmup`."""
    session = compiled._session
    sizes = _positive("batch_sizes", batch_sizes), _positive("lengths", lengths)
    config = session.program.config
    slot = config.slot_rank or config.max_rank
    if rank is None and config.slot_rank is not None:
        rank = min(DEFAULT_RANK, slot)
    rank = dummy_rank(session.program.sites, config.max_rank, rank)
    with session.lock:
        examples: tuple[Example, ...]
        if example_inputs is None:
            device = session.program.runtime.device
            examples = (derived_example(compiled.model, device, sizes[0][0], sizes[1][0]),)
        else:
            examples = given_examples(compiled.entry(compiled.model).roles, example_inputs)
        alone = generate is None or generate is False
        plan = WarmupPlan(examples, *sizes, alone, _generation(compiled.model, generate))
        count = 2 if config.max_adapters > -(-rank // slot) else 1  # that find slots together
        names = [f"warm-up {i}" for i in range(count)]
        dummies = [dummy(name, session.program.sites, rank, seed=i) for i, name in enumerate(names)]
        if any_begins(session, session.store.names):
            dummies.append(replace(dummies[0], name=_BEGINS, invocation=(0,)))
        calls = list(_calls(compiled, plan, [adapter.name for adapter in dummies]))

        def run() -> None:
            for adapter in dummies:
                session.store.load(adapter)
            for number, (what, call) in enumerate(calls, start=1):
                with progress(f"warm-up {number} of {len(calls)}: {what}"):
                    call()

        with _undisturbed(compiled):
            _serving_dummies(session, run)


# --- dummies ---


def dummy_rank(sites: Sequence[Site], max_rank: int, rank: int | None = None) -> int:
    """The rank of dummies: `rank`, or DEFAULT_RANK where that fits, rounded up to the least common
    multiple of the shard counts of the sites.

    Raises:
        ConfigError: `rank` is no positive int, or a class counts shards in another way.
        CapacityError: the banks hold no such rank.
    """
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ConfigError(f"warmup(rank=...) must be a positive integer, got {rank!r}")
    wanted = min(DEFAULT_RANK, max_rank) if rank is None else rank
    shards = {site.path: _shards(site) for site in sites}
    multiple = math.lcm(*shards.values())
    rounded = -(-wanted // multiple) * multiple
    if rounded > max_rank:
        said = "default rank" if rank is None else "rank"
        why = ""
        if multiple > 1:
            sharded = [f"{path} {count}" for path, count in shards.items() if count > 1]
            why = (
                f", rounded up to a multiple of {multiple} because LoRA ranks are sharded "
                f"({some(sharded)}),"
            )
        raise CapacityError(
            f"warm-up adapters of {said} {wanted}{why} need rank {rounded}, over max_rank = "
            f"{max_rank}; compile with LoraConfig(max_rank={rounded})"
            + ("" if rank is None else ", or give a smaller rank")
        )
    return rounded


def _shards(site: Site) -> int:
    count = site.eligible.rank_shards
    if count is None:
        return 1
    shards = count(site.module)
    if not isinstance(shards, int) or isinstance(shards, bool) or shards < 1:
        raise ConfigError(
            f"{site.path}: rank_shards of {type(site.module).__qualname__} must be a "
            f"positive integer, got {shards!r}"
        )
    return shards


def dummy(name: str, sites: Sequence[Site], rank: int, *, seed: int) -> Adapter:
    """An adapter of small random factors for every part of every site, the same every time.

    Not zeros: `Options(verify="numeric")` compares the passes on the first call, which this is.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for site in sites:
        each = () if site.expert_weight is None else (site.experts,)
        for index, part in enumerate(site.parts):
            k, n = part.in_features, part.out_features
            a = torch.randn(*each, rank, k, generator=generator) / k**0.5
            b = torch.randn(*each, n, rank, generator=generator) / rank**0.5
            weights[site.part_path(index)] = LoraWeights(a, b, 0.01)
    return Adapter(name, weights, rank, "warm-up")


def _serving_dummies(session: Session, run: Callable[[], None]) -> None:
    """Run with no adapters but those that `run` loads; all is as before afterwards."""
    runtime = session.program.runtime
    rows, active, warming = runtime.rows, runtime.active, session.running._replace(warming=True)
    try:
        session.run(warming, lambda: session.store.set_aside(run))
    finally:
        session.forget_served()
        runtime.set_rows(rows)
        runtime.active = active


@contextmanager
def _undisturbed(compiled: CompiledModel) -> Iterator[None]:
    """Random states and the buffers that the model's forward writes are put back afterwards."""
    device = compiled._session.program.runtime.device
    buffers = [(buffer, buffer.clone()) for buffer in compiled.model.buffers() if _is_state(buffer)]
    python = random.getstate()
    indices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(indices, device_type=device.type if indices else "cuda"):
            yield
    finally:
        random.setstate(python)
        with torch.no_grad(), torch.inference_mode(False):
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _is_state(buffer: Tensor) -> bool:
    """Whether a forward may keep something in it, such as running statistics. Large buffers are
    packed weights and tables, which nobody writes and a copy of which may not fit."""
    return buffer.numel() <= 1 << 20 and buffer.device.type != "meta" and not buffer.is_inference()


# --- calls ---


def _calls(
    compiled: CompiledModel, plan: WarmupPlan, dummies: Sequence[str]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """(what it is, the call) in the order in which they run."""
    whole = [name for name in dummies if name != _BEGINS]
    first, last = whole[0], whole[-1]
    for example in plan.examples:
        variants = example.variants(plan.batch_sizes, plan.lengths)
        # A graph of several requests may serve one, too, but not the other way round.
        for variant in sorted(variants, key=lambda variant: variant.rows == 1):
            rows = variant.rows
            batches: dict[str, NameList] = {
                "no adapter": [None] * rows,
                "one adapter": [first] * rows,
            }
            if rows > 1:
                batches["a mix"] = [(first, None, last)[row % 3] for row in range(rows)]
            if _BEGINS in dummies:
                batches["an aLoRA adapter"] = [_BEGINS] * rows
            for label, names in batches.items():
                mixed = len(set(names)) > 1 or _BEGINS in names
                if plan.forward:
                    yield (
                        f"forward, {variant}, {label}",
                        _call(_forward, mixed, compiled, variant, names),
                    )
                if plan.generate is not None and variant.can_generate:
                    padded = variant.padded()
                    for prompts in (variant,) if padded is None else (variant, padded):
                        what = f"generate, {variant}, {label}"
                        yield (
                            what if prompts is variant else f"{what}, padded",
                            _call(_generate, mixed, compiled, prompts, names, plan.generate),
                        )


def _call(run: Callable[..., None], mixed: bool, *arguments: Any) -> Callable[[], None]:
    """`run` with its arguments. A mix may be refused, where whose row is whose is not proved; its
    graph is captured then, and batches of one adapter are served by it. Where the model takes no
    token ids, an aLoRA adapter is refused by a BatchError."""

    def call() -> None:
        with contextlib.suppress(*((ProvenanceError, BatchError) if mixed else ())):
            run(*arguments)

    return call


def _forward(compiled: CompiledModel, example: Example, names: NameList) -> None:
    """The call, and one more token with the cache that it returned."""
    inputs = dict(example.named)
    output = compiled(**inputs, adapter_names=names)
    following = decode_step(compiled.model, inputs, output)
    if following is not None:
        compiled(**following, adapter_names=names)


def _generate(
    compiled: CompiledModel, example: Example, names: NameList, settings: Mapping[str, Any]
) -> None:
    compiled.generate(**example.prompt(), **settings, adapter_names=names)


def _generation(
    model: nn.Module, generate: bool | Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Keyword arguments of `generate`, None to leave it out.

    Raises:
        ConfigError: it is asked for and the model has none.
    """
    can = getattr(model, "can_generate", None)
    able = callable(getattr(model, "generate", None)) and (can is None or bool(can()))
    if generate is False or (generate is None and not able):
        return None
    if not able:
        raise ConfigError(f"{type(model).__name__} cannot generate; leave out warmup(generate=...)")
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    defaults = getattr(model, "generation_config", None)
    if getattr(defaults, "pad_token_id", None) is None:
        settings["pad_token_id"] = 0  # said by the caller, or transformers warns at every call
    if isinstance(generate, Mapping):
        if "max_new_tokens" in generate:
            settings["min_new_tokens"] = generate["max_new_tokens"]
        settings.update(generate)
    elif generate not in (None, True):
        raise ConfigError(
            "warmup(generate=...) must be a bool or keyword arguments of generate, got "
            f"{generate!r}"
        )
    return settings


def _positive(name: str, values: Sequence[int]) -> tuple[int, ...]:
    listed = [values] if isinstance(values, int) else list(values)
    if not listed or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in listed):
        raise ConfigError(f"warmup({name}=...) must hold positive integers, got {values!r}")
    return tuple(dict.fromkeys(listed))
