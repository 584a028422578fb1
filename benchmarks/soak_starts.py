"""Starts of a small model, each interrupted and killed while its graphs are compiled beside it.

    export PYTHONPATH=tests/helpers:tests/conformance
    python benchmarks/soak_starts.py [STARTS] [LOWERING] [LIFE]

A start is a process of at most LIFE seconds (20) that compiles the model with `start="eager"` and
serves: forwards, and prompts with steps behind them, of one to three rows, each of another adapter
or none. At random moments it is sent SIGINT, its processes beside are killed, and in the end so is
it, or it exits. Every answer is compared with that of a copy of the model whose adapter is merged
densely. After each start no process of it may be left, no broken file in the folder of saved
graphs, which some starts find full and some empty, and no folder of its own if it was not killed.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import torch
from dense_merge import TOLERANCE, error, random_base, save_adapter
from torch import Tensor, nn
from transformers import DynamicCache

import lorafx
from lorafx.capture.saved_graphs.folder import BrokenFile, read

ADAPTERS = ("a", "b")
TOKENS = torch.tensor(
    [[3, 9, 27, 20, 60, 14, 7], [11, 5, 8, 40, 31, 2, 9], [50, 2, 2, 17, 33, 4, 1]]
)
PROMPT = 4
#: What a start writes for each answer: whether it is right, and whether there were graphs.
TOLD = {"e": "eager answers", "g": "answers with graphs", "w": "wrong answers", "i": "interrupted"}
#: What must not be.
WRONG = ("wrong answers", "errors", "orphans", "broken files", "folders left")
#: What the processes of a start may take to end behind it, in seconds.
GRACE = 10.0


@dataclass
class Answers:
    """The model, its adapters, and the logits of each row of TOKENS with each of them."""

    folder: Path
    model: nn.Module = field(default_factory=lambda: random_base("llama", num_hidden_layers=1))
    files: dict[str, Path] = field(default_factory=dict)
    logits: dict[str | None, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        targets: tuple[Any, ...] = ("all-linear", ["q_proj", "v_proj", "down_proj"])
        for number, name in enumerate(ADAPTERS):
            self.files[name] = save_adapter(
                self.model,
                self.folder / name,
                rank=2 + number,
                targets=targets[number],
                seed=number,
            )
        with torch.no_grad():
            self.logits[None] = self.model(TOKENS).logits
            for name, path in self.files.items():
                self.logits[name] = oracle.merged(self.model, path)(TOKENS).logits

    def right(self, got: Tensor, rows: list[int], names: list[str | None], begin: int) -> bool:
        """Whether these are the logits of the rows, from a token on."""
        pairs = zip(rows, names, got, strict=True)
        return all(
            error(mine, self.logits[name][row, begin : begin + len(mine)]) <= TOLERANCE
            for row, name, mine in pairs
        )


class Start:
    """What the process of a start does. It writes a letter of TOLD into a file for each answer."""

    def __init__(self, answers: Answers, lowering: str, folder: Path, seed: int) -> None:
        self.answers, self.lowering, self.folder = answers, lowering, folder
        self.rng = random.Random(seed)
        self.told = os.open(folder / "told", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self.cm: Any = None
        self.serving = self.stopping = False
        signal.signal(signal.SIGINT, self.interrupt)
        signal.signal(signal.SIGTERM, self.stop)

    def interrupt(self, *_: Any) -> None:
        if self.serving:
            raise KeyboardInterrupt

    def stop(self, *_: Any) -> None:
        self.stopping = True

    def run(self) -> None:
        soak = os.getppid()
        while not self.stopping and os.getppid() == soak:
            time.sleep(self.rng.choice((0.0, 0.02, 0.2)))  # a server that nobody asks anything
            try:
                self.serving = True
                self.serve()
                self.serving = False
            except KeyboardInterrupt:
                self.serving = False
                os.write(self.told, b"i")

    def serve(self) -> None:
        if self.cm is None:
            self.cm = lorafx.compile(
                self.answers.model,
                lorafx.LoraConfig(max_adapters=len(ADAPTERS)),
                adapters=self.answers.files,
                options={"lowering": self.lowering, "start": "eager"},
            )
        count = self.rng.choice((1, 2, 3))
        rows = self.rng.sample(range(len(TOKENS)), count)
        names = [self.rng.choice((None, *ADAPTERS)) for _ in rows]
        ids = TOKENS[rows]
        if self.rng.random() < 0.5:
            self.tell(self.cm(input_ids=ids, adapter_names=names).logits, rows, names, 0)
            return
        past = DynamicCache(config=self.answers.model.config)
        for begin, end in ((0, PROMPT), *((at, at + 1) for at in range(PROMPT, TOKENS.shape[1]))):
            logits = self.cm(
                input_ids=ids[:, begin:end], past_key_values=past, adapter_names=names
            ).logits
            self.tell(logits, rows, names, begin)

    def tell(self, logits: Tensor, rows: list[int], names: list[str | None], begin: int) -> None:
        right = self.answers.right(logits, rows, names, begin)
        os.write(self.told, b"w" if not right else b"g" if self.cm.recompiles else b"e")


class Soak:
    def __init__(self, starts: int, lowering: str, life: float, folder: Path) -> None:
        self.starts, self.lowering, self.life, self.folder = starts, lowering, life, folder
        self.answers = Answers(folder)
        self.rng = random.Random(0)
        self.counts = collections.Counter(dict.fromkeys(WRONG, 0))

    def run(self) -> bool:
        """Whether all went well; None of a start's own process comes back from here."""
        for number in range(self.starts):
            self.start(number)
            if number % 10 == 9 or number == self.starts - 1 or self.failures():
                print(f"{number + 1} starts: {dict(self.counts)}", flush=True)
        return not self.failures()

    def failures(self) -> int:
        return sum(self.counts[name] for name in WRONG)

    def start(self, number: int) -> None:
        folder = self.folder / f"start{number}"
        folder.mkdir()
        full = self.rng.random() < 0.3
        cache = self.folder / "cache" if full else folder / "cache"
        signals = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until the start has handlers of its own
        pid = os.fork()
        if not pid:
            self.serve(folder, cache, number, signals)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        end = time.monotonic() + self.rng.uniform(0.2, self.life)
        while time.monotonic() < end:
            time.sleep(self.rng.expovariate(1.0))
            if self.rng.random() < 0.7:
                os.kill(pid, signal.SIGINT)
                self.counts["interrupts"] += 1
            for beside in _of_session(pid):
                if self.rng.random() < 0.05 and beside != pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(beside, signal.SIGKILL)
                        self.counts["processes beside killed"] += 1
        killed = self.rng.random() < 0.5
        self.counts["starts killed" if killed else "starts ended"] += 1
        os.kill(pid, signal.SIGKILL if killed else signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        if status not in (0, signal.SIGKILL):
            self.counts["errors"] += 1
            print(f"start {number} ended with {status}\n{_text(folder / 'error')}", flush=True)
        self.look_behind(pid, folder, cache, killed=killed)

    def serve(self, folder: Path, cache: Path, number: int, signals: set[signal.Signals]) -> None:
        """The life of a start's process, which ends as any program does."""
        os.setsid()  # by which its processes are known
        os.environ["LORAFX_CACHE_DIR"] = str(cache)
        tempfile.tempdir = str(folder)
        try:
            start = Start(self.answers, self.lowering, folder, number)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            start.run()
        except BaseException:
            (folder / "error").write_text(traceback.format_exc())
            sys.exit(1)
        sys.exit(0)

    def look_behind(self, pid: int, folder: Path, cache: Path, *, killed: bool) -> None:
        told = _text(folder / "told")
        for letter, name in TOLD.items():
            self.counts[name] += told.count(letter)
        last = time.monotonic() + GRACE
        while (left := list(_of_session(pid))) and time.monotonic() < last:
            time.sleep(0.05)
        for orphan in left:
            self.counts["orphans"] += 1
            print(f"an orphan: {_text(Path(f'/proc/{orphan}/cmdline'))}", flush=True)
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        for path in cache.glob("graphs/*/*"):
            if path.suffix != ".graph":
                self.counts["files not renamed yet"] += 1  # which nobody reads
                continue
            self.counts["files"] += 1
            try:
                read(path, path.parent.name)
            except BrokenFile as broken:
                self.counts["broken files"] += 1
                print(f"{path}: {broken}", flush=True)
        if not killed:
            self.counts["folders left"] += len(list(folder.glob("lorafx-*")))
        shutil.rmtree(folder)


def _of_session(leader: int) -> Iterator[int]:
    """The processes of a session that have not ended."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                state, _, _, session = (
                    Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:4]
                )
                if int(session) == leader and state not in "ZX":
                    yield int(name)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def main() -> None:
    starts, lowering = int((*sys.argv[1:], "200")[0]), (*sys.argv[2:], "reference")[0]
    life = float((*sys.argv[3:], "20")[0])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a process that is forked has none of its parent's
    os.environ.pop("LORAFX_CACHE_BYTES", None)
    folder, parent = Path(tempfile.mkdtemp()), os.getpid()
    try:
        well = Soak(starts, lowering, life, folder).run()
    finally:
        if os.getpid() == parent:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
