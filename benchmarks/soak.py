"""Eight threads over one compiled model for a while, everything that may happen happening at once.

    PYTHONPATH=tests/helpers:tests/conformance python benchmarks/soak.py SECONDS [LOWERING]

Every answer is compared with those of the states that were possible while the call ran. A change is
noted before it begins and after it has ended. A call may have been served by any state that was
possible while it ran, but by one alone: the same weights in all layers, for all rows. The main
thread is interrupted at random moments in the middle of all of it.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import faulthandler
import gc
import itertools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import torch
from dense_merge import error, random_base, save_adapter
from safetensors.torch import load_file
from torch import Tensor, nn

import lorafx
from lorafx.adapter_store.stored import StoredAdapter
from lorafx.errors import (
    BatchError,
    CaptureError,
    CheckpointError,
    OutOfRangeError,
    UnknownAdapterError,
)
from lorafx.runtime.running import IDLE

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


THREADS = 8
#: The longest that one operation may take, waiting included.
LIMIT = 90.0


class Soak:
    def __init__(self, seconds: float, lowering: str, folder: Path) -> None:
        self.seconds, self.folder = seconds, folder
        self.answers = Answers(folder)
        self.model = copy.deepcopy(self.answers.bases[0])
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        with torch.no_grad():
            self.base_logits = self.model(PROMPTS).logits
        self.cm = lorafx.compile(
            self.model,
            lorafx.LoraConfig(max_adapters=SLOTS),
            adapters={name: self.answers.files[name, 0] for name in NAMES},
            options={"lowering": lowering},
        )
        self.book = Book({"base": 0, "merged": None, "default": None, **dict.fromkeys(NAMES, 0)})
        self.counts: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.stopping = threading.Event()
        self.longest = 0.0
        self.begun = time.monotonic()

    # --- calls ---

    def names(self, rng: random.Random, rows: int) -> list[str | None]:
        """Two adapters at most: one slot may be pinned."""
        pair = [None, *rng.sample(NAMES, 2)]
        return [rng.choice(pair) for _ in range(rows)]

    def served(self, names: list[str | None] | None, run: Callable[..., Any]) -> Any:
        """What the call gives, None where it is refused for a reason that there is."""
        with self.book.call() as seen:
            try:
                result = run(adapter_names=names)
            except UnknownAdapterError:
                if not any(None in seen[name] for name in names or NAMES if name):
                    raise
                return None
            except BatchError as refused:
                if "merged into" not in str(refused) or seen["merged"] == {None}:
                    raise
                return None
        return seen, result, names or ["default"] * len(PROMPTS)

    def call(self, rng: random.Random) -> None:
        names = None if rng.random() < 0.2 else self.names(rng, len(PROMPTS))
        got = self.served(names, lambda **kw: self.cm(input_ids=PROMPTS, **kw).logits)
        if got is not None:
            seen, logits, names = got
            self.check(self.answers.right_logits(seen, names, logits), "forward", names, seen)

    def generate(self, rng: random.Random) -> None:
        """Greedy, two prompts or beams of one; streamers that raise in the middle."""
        beams = rng.random() < 0.3
        rows = 1 if beams or rng.random() < 0.5 else 2
        names: Any = self.names(rng, rows)
        streamer = Streamer(fails_at=rng.choice((None, 1, 3))) if rows == 1 and not beams else None
        settings = BEAMS if beams else GREEDY

        def run(**kw: Any) -> Tensor:
            return self.cm.generate(
                PROMPTS[:rows], **settings, **kw, streamer=streamer, pad_token_id=0
            )

        try:
            got = self.served(names, run)
        except Failing:
            self.counts["streamer raised"] += 1
            return
        if got is not None:
            seen, tokens, names = got
            right = self.answers.right_tokens(seen, names, tokens, settings["num_beams"])
            self.check(right, "generate", names, seen)

    def bad_call(self, rng: random.Random) -> None:
        """A token that the vocabulary does not have."""
        names = self.names(rng, len(PROMPTS))
        try:
            got = self.served(names, lambda **kw: self.cm(input_ids=PROMPTS + 100, **kw))
        except OutOfRangeError:
            return
        self.check(got is None, "an impossible token was served")

    def check(self, right: bool, *what: Any) -> None:
        if not right:
            raise AssertionError(f"wrong answer: {what}")

    # --- changes ---

    @contextlib.contextmanager
    def change(self, key: str, value: Any) -> Iterator[None]:
        """`key` becomes `value`; where the block raises, it may be what it was or that."""
        with self.book.changing[key]:
            before = self.book.possible(key)
            self.book.begin(key, value)
            try:
                yield
            except BaseException:
                self.book.end(key, value, *before)
                raise
            self.book.end(key, value)

    def replace(self, rng: random.Random) -> None:
        name, version = rng.choice(NAMES), rng.randrange(VERSIONS)
        # A merged one is not replaced, so nobody merges meanwhile.
        with self.book.changing["merged"]:
            if self.book.possible("merged") == {None}:
                with self.change(name, version):
                    self.cm.load_adapter(self.answers.files[name, version], name)

    def broken_file(self, rng: random.Random) -> None:
        name = rng.choice(NAMES)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copytree(self.answers.files[name, 0], folder, dirs_exist_ok=True)
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[: -rng.randrange(1, 400)])
        try:
            self.cm.load_adapter(folder, name)
        except (CheckpointError, lorafx.errors.ConfigError):
            return
        finally:
            shutil.rmtree(folder)
        raise AssertionError("a file that was cut off was loaded")

    def unload(self, rng: random.Random) -> None:
        name = rng.choice(NAMES[:2])
        with self.book.changing["merged"], self.book.changing["default"]:
            if self.book.possible("merged") != {None} or self.book.possible("default") != {None}:
                return
            with self.book.changing[name]:
                with self.change(name, None), contextlib.suppress(UnknownAdapterError):
                    self.cm.unload_adapter(name)
                with self.change(name, 0):
                    self.cm.load_adapter(self.answers.files[name, 0], name)

    def pin(self, rng: random.Random) -> None:
        """Always the same, so that one slot is pinned at most."""
        self.cm.pin_adapter("d")
        if rng.random() < 0.5:
            self.cm.unpin_adapter("d")

    def default(self, rng: random.Random) -> None:
        with self.book.changing["merged"]:
            if self.book.possible("merged") != {None}:
                return
            name = rng.choice((None, "c", "d"))
            with self.change("default", name):
                self.cm.set_adapter(name)

    def push(self, rng: random.Random) -> None:
        base = rng.randrange(BASES)
        state = {k: v.clone() for k, v in self.answers.bases[base].state_dict().items()}

        def pairs() -> Iterator[tuple[str, Tensor]]:
            yield from state.items()

        def raising() -> Iterator[tuple[str, Tensor]]:
            yield from list(state.items())[: rng.randrange(len(state))]
            raise Failing

        source = rng.choice((state, pairs(), pairs, raising()))
        with self.book.changing["merged"], self.book.changing["base"]:
            if self.book.possible("merged") != {None}:  # weights are loaded into the base alone
                return
            before = self.book.possible("base")
            self.book.begin("base", base, BROKEN)
            try:
                self.cm.load_weights(source)
            except Failing:  # what had been written is put back
                self.book.end("base", *before)
                self.counts["push raised"] += 1
            except BaseException:
                self.book.end("base", base, BROKEN, *before)
                raise
            else:
                self.book.end("base", base)

    def merge(self, rng: random.Random) -> None:
        """Merge, serve so for a moment, and take it out again."""
        name = rng.choice(NAMES)
        with self.book.changing["merged"], self.book.changing["default"]:
            if self.book.possible("default") not in ({None}, {name}) or None in (
                self.book.possible(name)
            ):
                return
            with self.change("merged", name):
                self.cm.merge(name)
            try:
                self.call(rng)
            finally:
                with self.change("merged", None):
                    self.cm.unmerge()

    def export(self, rng: random.Random) -> None:
        name, folder = rng.choice(NAMES[2:]), Path(tempfile.mkdtemp(dir=self.folder))
        with self.book.changing["merged"], self.book.call() as seen:
            if self.book.possible("merged") == {None}:
                self.cm.export_merged(name, folder)
                state = load_file(folder / "model.safetensors")
                self.check(self.answers.right_weights(seen, name, state), "export", name, seen)
        shutil.rmtree(folder)

    # --- who does what ---

    def act(self, rng: random.Random) -> None:
        acts: dict[Callable[..., None], int] = {
            self.call: 40, self.generate: 15, self.bad_call: 3, self.replace: 12, self.unload: 4,
            self.broken_file: 2, self.pin: 6, self.default: 5, self.push: 5, self.merge: 4,
            self.export: 1,
        }  # fmt: skip
        (chosen,) = rng.choices(list(acts), list(acts.values()))
        begin = time.monotonic()
        try:
            with self.book.call() as seen:
                chosen(rng)
        except CaptureError as refused:
            if "base weights" not in str(refused) or BROKEN not in seen["base"]:
                raise
        finally:
            self.longest = max(self.longest, time.monotonic() - begin)
        self.counts[chosen.__name__] += 1

    def work(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stopping.is_set():
            try:
                self.act(rng)
            except Exception:
                self.problems.append(traceback.format_exc())
                self.stopping.set()

    def interrupted(self, rng: random.Random) -> None:
        """As `work`, on the main thread, with a signal at a random moment of each operation."""
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.choice((0.002, 0.02, 0.1)) * rng.random())
                self.act(rng)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            self.counts["interrupts"] += 1
            self.repair()

    def repair(self) -> None:
        """Whatever an interrupt left possible, make it certain. Nothing else may be needed."""
        cm, book = self.cm, self.book
        with book.changing["merged"]:
            if cm.merged is not None:  # weights are loaded into the base alone
                with self.change("merged", None):
                    cm.unmerge()
            if cm._session.base.broken or len(book.possible("base")) > 1:
                with book.changing["base"], self.change("base", 0):
                    cm.load_weights(self.answers.bases[0].state_dict())
            book.end("merged", None)
            for name in NAMES:  # nobody merges one of them meanwhile
                with book.changing[name]:
                    if len(book.possible(name)) > 1 or None in book.possible(name):
                        with self.change(name, 0):
                            cm.load_adapter(self.answers.files[name, 0], name)
        with book.changing["default"]:
            if len(book.possible("default")) > 1:
                with self.change("default", None):
                    cm.set_adapter(None)

    def run(self) -> dict[str, Any]:
        self.say("made")
        capture_all(self.cm)
        self.say("warm")
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        rng, begin = random.Random(0), time.monotonic()
        workers = [
            threading.Thread(target=self.work, args=(seed,), daemon=True)
            for seed in range(1, THREADS)
        ]
        for worker in workers:
            worker.start()
        warm: dict[str, int] = {}
        while not self.stopping.is_set() and time.monotonic() - begin < self.seconds:
            self.interrupted(rng)
            if not warm and time.monotonic() - begin > self.seconds / 3:
                warm = size_of(self.cm)
                self.say(f"{warm}")
        self.stopping.set()
        for worker in workers:
            worker.join(2 * LIMIT)
            if worker.is_alive():
                faulthandler.dump_traceback(all_threads=True)
                raise AssertionError("a thread waits for ever")
        if self.problems:
            raise AssertionError("\n".join(self.problems))
        self.finish()
        end = size_of(self.cm)
        self.detach()
        return {"warm": warm, "end": end, "longest": round(self.longest, 1), **self.counts}

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.begun:.0f} s: {what}, {dict(self.counts)}", flush=True)

    def finish(self) -> None:
        """All is at rest, and nothing is held."""
        self.repair()
        self.cm.load_weights(self.start)
        session = self.cm._session
        for lock in (session.lock, session.weights_lock, session.store._lock):
            assert is_free(lock), "a lock is still held"
        assert session.running is IDLE

    def detach(self) -> None:
        """The model by itself is what it was before it was compiled."""
        model = self.cm.detach()
        state = model.state_dict()
        assert list(state) == list(self.start)
        for name, value in self.start.items():
            assert torch.equal(state[name], value), f"{name} has other values than at the start"
        assert not any(module._forward_hooks for module in model.modules())
        with torch.no_grad():
            assert torch.equal(model(PROMPTS).logits, self.base_logits)


def main() -> None:
    seconds, lowering = float(sys.argv[1]), (*sys.argv[2:], "reference")[0]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    faulthandler.enable()
    faulthandler.dump_traceback_later(seconds + 6 * LIMIT, exit=True)
    with tempfile.TemporaryDirectory() as folder:
        status = 1
        try:
            print(Soak(seconds, lowering, Path(folder)).run(), flush=True)
            status = 0
        except BaseException:
            traceback.print_exc()
    os._exit(status)  # threads that still run are not waited for


if __name__ == "__main__":
    main()
