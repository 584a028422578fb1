"""What a soak knows of its model: the states that may be served at a moment, and what each answers.

A change is noted before it begins and after it has ended. A call may have been served by any state
that was possible while it ran, but by one alone: the same weights in all layers, for all rows.
"""

from __future__ import annotations

import gc
import itertools
import resource
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import torch
from dense_merge import error, random_base, save_adapter
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store.stored import StoredAdapter

#: Adapters, versions of each, versions of the base, slots: fewer than adapters.
NAMES = ("a", "b", "c", "d")
VERSIONS = BASES = 2
SLOTS = 3
PROMPTS = torch.tensor([[3, 9, 27, 20, 60], [11, 5, 8, 40, 31], [50, 2, 2, 17, 33]])
GREEDY = {"max_new_tokens": 4, "do_sample": False, "num_beams": 1}
BEAMS = {**GREEDY, "num_beams": 2}
TOLERANCE = 1e-5
#: No version of the base: a push was cut short where no second copy is kept, and calls are refused.
BROKEN = -1


class Failing(Exception):
    """What a streamer, or a source of weights, raises."""


class Streamer:
    def __init__(self, fails_at: int | None) -> None:
        self.fails_at, self.count = fails_at, 0

    def put(self, tokens: Tensor) -> None:
        self.count += 1
        if self.count == self.fails_at:
            raise Failing

    def end(self) -> None: ...


class Book:
    """The possible values of each thing that may change, now and during every running call."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        self._lock = threading.Lock()
        self._now = {key: {value} for key, value in start.items()}
        self._running: list[dict[str, set[Any]]] = []
        #: Who changes a thing: one thread at a time.
        self.changing = {key: threading.RLock() for key in start}

    def begin(self, key: str, *values: Any) -> None:
        """Somebody begins to change `key`; it may be any of these from now on."""
        with self._lock:
            self._now[key] |= set(values)
            for call in self._running:
                call[key] |= set(values)

    def end(self, key: str, *values: Any) -> None:
        """It is one of these now."""
        with self._lock:
            self._now[key] = set(values)

    def possible(self, key: str) -> set[Any]:
        with self._lock:
            return set(self._now[key])

    @contextmanager
    def call(self) -> Iterator[dict[str, set[Any]]]:
        """What is possible while the block runs."""
        with self._lock:
            seen = {key: set(values) for key, values in self._now.items()}
            self._running.append(seen)
        try:
            yield seen
        finally:
            with self._lock:
                self._running = [other for other in self._running if other is not seen]


@dataclass
class Answers:
    """What the model answers in each state: copies of it with an adapter merged densely."""

    folder: Path
    bases: list[nn.Module] = field(default_factory=list)
    files: dict[tuple[str, int], Path] = field(default_factory=dict)
    models: dict[tuple[int, str | None, int], nn.Module] = field(default_factory=dict)
    logits: dict[Any, Tensor] = field(default_factory=dict)
    tokens: dict[Any, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = random_base("llama", num_hidden_layers=1)
        second = random_base("llama", num_hidden_layers=1)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in second.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.2 * float(parameter.std() + 0.1))
        self.bases = [first, second]
        targets = (["q_proj", "v_proj", "down_proj"], "all-linear", ["gate_proj", "o_proj"])
        for number, (name, version) in enumerate(itertools.product(NAMES, range(VERSIONS))):
            self.files[name, version] = save_adapter(
                first,
                self.folder / f"{name}{version}",
                rank=(2, 3, 5, 4)[number // VERSIONS],
                targets=targets[number % len(targets)],
                seed=number,
            )
        for base, model in enumerate(self.bases):
            self.models[base, None, 0] = model
            for (name, version), path in self.files.items():
                self.models[base, name, version] = oracle.merged(model, path)
        with torch.no_grad():
            for key, model in self.models.items():
                for prompt, ids in enumerate(PROMPTS):
                    self.logits[key, prompt] = model(ids[None]).logits[0]
                    for settings in (GREEDY, BEAMS):
                        out = model.generate(ids[None], **settings, pad_token_id=0)
                        self.tokens[key, prompt, settings["num_beams"]] = out[0]

    def states(self, seen: Mapping[str, set[Any]], names: Sequence[str | None]) -> Iterator[list]:
        """For every state of the sets: the key of each row's model. Rows of one adapter have one
        version of it, and all rows one base."""
        for base, merged, default in itertools.product(
            seen["base"] - {BROKEN}, seen["merged"], seen["default"]
        ):
            used = [merged or (default if name == "default" else name) for name in names]
            distinct = sorted({name for name in used if name is not None})
            for versions in itertools.product(*(sorted(seen[n] - {None}) for n in distinct)):
                version = dict(zip(distinct, versions, strict=True))
                yield [(base, name, version[name] if name else 0) for name in used]

    def right_logits(self, seen: Any, names: Sequence[str | None], got: Tensor) -> bool:
        return any(
            all(error(got[row], self.logits[key, row]) <= TOLERANCE for row, key in enumerate(keys))
            for keys in self.states(seen, names)
        )

    def right_tokens(self, seen: Any, names: Sequence[str | None], got: Tensor, beams: int) -> bool:
        return any(
            all(self._as_good(key, row, got[row], beams) for row, key in enumerate(keys))
            for keys in self.states(seen, names)
        )

    def _as_good(self, key: Any, prompt: int, got: Tensor, beams: int) -> bool:
        """Whether these are the tokens, or as probable to the last bit but few."""
        want = self.tokens[key, prompt, beams]
        length = min(len(got), len(want))
        if torch.equal(got[:length], want[:length]):
            return True
        model = self.models[key]
        scores = [self._score(model, tokens, prompt) for tokens in (got, want)]
        return abs(scores[0] - scores[1]) <= 1e-4

    @torch.no_grad()
    def _score(self, model: nn.Module, tokens: Tensor, prompt: int) -> float:
        start = len(PROMPTS[prompt])
        found = model(tokens[None]).logits[0, start - 1 : -1].log_softmax(-1)
        return float(found.gather(1, tokens[start:, None]).sum())

    def right_weights(self, seen: Any, name: str, state: Mapping[str, Tensor]) -> bool:
        """Whether these are the weights of some state with `name` merged."""
        for base, version in itertools.product(seen["base"] - {BROKEN}, seen[name] - {None}):
            want = self.models[base, name, version].state_dict()
            if all(error(value, want[key]) <= TOLERANCE for key, value in state.items()):
                return True
        return False


def size_of(cm: Any) -> dict[str, int]:
    """What must not grow."""
    gc.collect()
    found = gc.get_objects()
    return {
        "graphs": cm.recompiles,
        "adapters": sum(isinstance(item, StoredAdapter) for item in found),
        "tensors": sum(issubclass(type(item), Tensor) for item in found),
        "MiB": int(Path("/proc/self/statm").read_text().split()[1])
        * resource.getpagesize()
        // 2**20,
    }


def is_free(lock: Any) -> bool:
    """Whether another thread can have the lock."""
    free: list[bool] = []

    def ask() -> None:
        free.append(lock.acquire(blocking=False))
        if free[0]:
            lock.release()

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    return free[0]


def capture_all(cm: lorafx.CompiledModel) -> None:
    """Every graph that the operations need: how beams are reordered, which depends on the tokens,
    is seen in the strides of the cache, and strides make graphs."""
    mixes: list[list[str | None]] = [[None] * 3, ["a"] * 3, ["a", None, "b"]]
    for names in mixes:
        for _ in range(2):
            cm(input_ids=PROMPTS, adapter_names=names)
            cm.generate(PROMPTS[:2], **GREEDY, adapter_names=names[-2:], pad_token_id=0)
    for name in (None, *NAMES):
        for prompt in PROMPTS:
            for settings in (GREEDY, BEAMS):
                cm.generate(prompt[None], **settings, adapter_names=[name], pad_token_id=0)
