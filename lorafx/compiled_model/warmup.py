"""Warm-up: captures the graphs that serving needs before the first request.

    calls = {forward, generate} × batch sizes × lengths × {no adapter, one adapter, a mix}

A graph does not depend on which adapters a batch has, so dummies represent all of them. If an aLoRA
adapter is loaded, each call is made once more with one, for the graphs with a slot for each token.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.adapter_store.stored import Adapter, LoraWeights
from lorafx.compiled_model.as_module import AsModule
from lorafx.eager.undo import Undo
from lorafx.errors import (
    BatchError,
    CapacityError,
    ConfigError,
    ProvenanceError,
    some,
    way_out_by,
)
from lorafx.generation.alora import any_begins
from lorafx.model.sites import Site
from lorafx.progress import progress
from lorafx.runtime.example_inputs import Example, decode_step, derived_example, example_of
from lorafx.runtime.session import Session

#: The rank of the dummies if banks have room for it and shards need no other; graphs do not depend
#: on it.
DEFAULT_RANK = 8
#: New tokens of a `generate` call: one from the prefill, two from decode steps.
NEW_TOKENS = 3
#: The name of the dummy that is activated at a token.
_ALORA = "warm-up aLoRA"

NameList = list["str | None"]


def warm_up(
    compiled: AsModule,
    generating: Callable[..., Any],
    example_inputs: Any,
    *,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    generate: bool | Mapping[str, Any] | None,
) -> None:
    """See `CompiledModel.warmup`; `generating` is its `generate`."""
    session = compiled._session
    sizes = _positive("batch_sizes", batch_sizes), _positive("lengths", lengths)
    config, sites = session.program.config, session.program.sites
    rank = dummy_rank(sites, config.max_rank)
    with session.lock:
        if example_inputs is None:
            device = session.program.runtime.device
            example = derived_example(compiled._orig_mod, device, sizes[0][0], sizes[1][0])
        else:
            example = example_of(compiled._entries.of(compiled._orig_mod).roles, example_inputs)
        settings = _generate_settings(compiled._orig_mod, generate)
        runs: dict[str, Callable[[Example, NameList], None]] = {}
        if generate is None or generate is False:
            runs["forward"] = partial(_forward, compiled)
        if settings is not None:
            runs["generate"] = partial(_generate, generating, settings)
        width = -(-rank // (config.slot_rank or config.max_rank))
        count = 2 if config.max_adapters > width else 1  # that many have slots together
        dummies = [dummy(f"warm-up {i}", sites, rank, seed=i) for i in range(count)]
        if any_begins(session, session.store.names):
            dummies.append(replace(dummies[0], name=_ALORA, invocation=(0,)))
        # Those of one request come last: a graph of several may serve one, but not the reverse.
        variants = sorted(example.variants(*sizes), key=lambda variant: variant.rows == 1)
        calls = list(_calls(runs, variants, [adapter.name for adapter in dummies]))

        def run() -> None:
            for adapter in dummies:
                session.store.load(adapter)
            for number, (label, call) in enumerate(calls, start=1):
                with progress(f"warm-up {number} of {len(calls)}: {label}"):
                    call()

        with state_restored(compiled):
            _serve_only_dummies(session, run)


# --- dummies ---


def dummy_rank(sites: Sequence[Site], max_rank: int) -> int:
    """The rank of dummies: DEFAULT_RANK, or `max_rank` if that is less, rounded up to a multiple of
    the numbers of shards of all sites.

    Raises:
        ConfigError: a class has a number of shards that is not a positive integer.
        CapacityError: the rank is over `max_rank`.
    """
    rank = min(DEFAULT_RANK, max_rank)
    shards = {site.path: _shards(site) for site in sites}
    multiple = math.lcm(*shards.values())
    rounded = -(-rank // multiple) * multiple
    if rounded > max_rank:
        sharded = [f"{path} {count}" for path, count in shards.items() if count > 1]
        needed = way_out_by("max_rank", rounded)
        raise CapacityError(
            f"warm-up adapters of default rank {rank}, rounded up to a multiple of {multiple} "
            f"because LoRA ranks are sharded ({some(sharded)}), need rank {rounded}, over "
            f"max_rank = {max_rank}; {needed}"
        ).naming(needed)
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
    """An adapter with small random factors, by `seed`, for every part of every site."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for site in sites:
        experts = () if site.expert_weight is None else (site.experts,)
        for index, part in enumerate(site.parts):
            k, n = part.in_features, part.out_features
            a = torch.randn(*experts, rank, k, generator=generator) / k**0.5
            b = torch.randn(*experts, n, rank, generator=generator) / rank**0.5
            weights[site.part_path(index)] = LoraWeights(a, b, 0.01)
    return Adapter(name, weights, rank, "warm-up")


def _serve_only_dummies(session: Session, run: Callable[[], None]) -> None:
    """Call `run` while no adapters are loaded but those that it loads; then restore everything."""
    runtime = session.program.runtime
    rows, active, warming = runtime.rows, runtime.active, session.running._replace(warming=True)
    try:
        session.run(warming, lambda: session.store.run_emptied(run))
    finally:
        session.forget_served()
        runtime.set_rows(rows)
        runtime.active = active


@contextmanager
def state_restored(compiled: AsModule) -> Iterator[None]:
    """Restores random states and the buffers that the model's forward writes, after the block."""
    undo = Undo((), compiled._session.program.runtime.device)
    undo.note(filter(_is_state, compiled._orig_mod.buffers()))
    try:
        yield
    finally:
        with torch.inference_mode(False):
            undo.run()


def _is_state(buffer: Tensor) -> bool:
    """Whether a forward may write into a buffer, as into running statistics. Large buffers are
    packed weights and tables, which no forward writes and whose copies may not fit into memory."""
    return buffer.numel() <= 1 << 20 and buffer.device.type != "meta" and not buffer.is_inference()


# --- calls ---


def _calls(
    runs: Mapping[str, Callable[[Example, NameList], None]],
    variants: Sequence[Example],
    dummies: Sequence[str],
) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call) in the order in which the calls run."""
    plain = [name for name in dummies if name != _ALORA]
    first, last = plain[0], plain[-1]
    for variant in variants:
        rows = variant.rows
        batches: dict[str, NameList] = {
            "no adapter": [None] * rows,
            "one adapter": [first] * rows,
        }
        if rows > 1:
            batches["a mix"] = [(first, None, last)[row % 3] for row in range(rows)]
        if _ALORA in dummies:
            batches["an aLoRA adapter"] = [_ALORA] * rows
        for label, names in batches.items():
            for kind, run in runs.items():
                padded = variant.padded() if kind == "generate" else None
                if kind == "generate" and not variant.can_generate:
                    continue
                text = f"{kind}, {variant}, {label}"
                yield text, partial(_run_call, run, variant, names)
                if padded is not None:
                    yield f"{text}, padded", partial(_run_call, run, padded, names)


def _run_call(run: Callable[[Example, NameList], None], example: Example, names: NameList) -> None:
    """Run a call. A mix may be refused if row owners are not proved; its graph is captured then,
    and serves batches of one adapter. An aLoRA adapter may be refused if there are no token ids."""
    may_be_refused = len(set(names)) > 1 or _ALORA in names
    with contextlib.suppress(*((ProvenanceError, BatchError) if may_be_refused else ())):
        run(example, names)


def _forward(compiled: AsModule, example: Example, names: NameList) -> None:
    """Run the call, and one for another token with the cache that it returned."""
    inputs = dict(example.named)
    output = compiled(**inputs, adapter_names=names)
    following = decode_step(compiled._orig_mod, inputs, output)
    if following is not None:
        compiled(**following, adapter_names=names)


def _generate(
    generating: Callable[..., Any], settings: Mapping[str, Any], example: Example, names: NameList
) -> None:
    generating(**example.prompt(), **settings, adapter_names=names)


def _generate_settings(
    model: nn.Module, generate: bool | Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """The keyword arguments of `generate`; None if it is not to be run.

    Raises:
        ConfigError: it is requested, and the model has none.
    """
    check = getattr(model, "can_generate", None)
    generates = callable(getattr(model, "generate", None)) and (check is None or bool(check()))
    if generate is False or (generate is None and not generates):
        return None
    if not generates:
        raise ConfigError(f"{type(model).__name__} cannot generate; leave out warmup(generate=...)")
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    defaults = getattr(model, "generation_config", None)
    if getattr(defaults, "pad_token_id", None) is None:
        settings["pad_token_id"] = 0  # without it transformers warns at every call
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
    numbers = [values] if isinstance(values, int) else list(values)
    if not numbers or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in numbers):
        raise ConfigError(f"warmup({name}=...) must hold positive integers, got {values!r}")
    return tuple(dict.fromkeys(numbers))
