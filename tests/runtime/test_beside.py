"""Calls are answered eagerly at once, while processes beside compile their graphs."""

from __future__ import annotations

import errno
import gc
import itertools
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_merge import TOLERANCE, Case, check_mixed, error
from slowly import few
from tiny_models import plain_inputs, token_inputs
from torch import nn
from torch._dynamo.utils import counters
from waiting import LONG

from lorafx.capture.saved_graphs import saved_graphs
from lorafx.errors import LorafxWarning, OutOfRangeError, ProvenanceError
from lorafx.runtime.beside import process as beside
from lorafx.runtime.beside.private_folder import PrivateFolder
from lorafx.runtime.beside.process import Process
from lorafx.torch_internals.versions import saves_graphs

pytestmark = [
    pytest.mark.any_sizes,
    pytest.mark.usefixtures("compiled_beside"),
    pytest.mark.skipif(not saves_graphs(), reason="torch cannot save graphs"),
]

SECONDS = float(LONG)
#: As users have them, not tests.
PRIORITIES = {name: getattr(beside, name) for name in ("_go_behind", "_NICE")}
NAMES = ["a0"] * 3


def started(case: Case, **options: Any) -> Any:
    """The case's model, compiled with a tier that answers at once."""
    return case.compile({"start": "eager", "cache": None, **options})


def served(cm: Any, case: Case, inputs: dict[str, Any], names: list[Any] = NAMES) -> None:
    """A call is right."""
    got = cm(**inputs, adapter_names=names)["logits"]
    assert error(got, case.expected(names, inputs)) <= TOLERANCE


def tiers(cm: Any) -> list[str]:
    return [kind.tier for kind in cm.status().kinds]


def processes(cm: Any) -> list[int]:
    return [process.pid for process in cm._entries.tiers.compilers.processes]


def running(pid: int) -> bool:
    """Whether a process runs, or has ended and nobody has waited for it."""
    return Path(f"/proc/{pid}").exists()


def traced() -> int:
    """How many graphs Dynamo has traced in this process."""
    count: int = counters["stats"]["unique_graphs"]
    return count


def test_first_calls_are_eager_and_later_ones_take_the_graph(plain: Case) -> None:
    before = traced()
    cm, inputs = started(plain), plain_inputs(3, 5)
    served(cm, plain, inputs)
    assert tiers(cm) == ["eager"]
    assert processes(cm) == []
    packs = cm._session.program.pack_watch
    served(cm, plain, inputs)
    assert tiers(cm) == ["compiling"]
    assert not packs.intact  # the process makes its own of so few bytes
    assert cm.recompiles == cm.status().graphs == 0
    (pid,) = processes(cm)
    assert cm.wait(SECONDS)
    assert not running(pid)
    assert tiers(cm) == ["ready"]
    assert cm.status().graphs == 1
    served(cm, plain, inputs)
    assert packs.intact
    assert cm.status().graphs == 1
    assert tiers(cm) == ["ready"]
    assert cm.recompiles == 1
    served(cm, plain, plain_inputs(5, 2), ["a1"] * 5)  # other sizes and adapters
    check_mixed(cm, plain, ["a0", None, "a1"], inputs)
    assert tiers(cm) == ["ready"]
    assert cm.recompiles == 1
    assert traced() == before


class Breaking(nn.Module):
    """A model that Dynamo cannot capture as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.up(x)
        torch._dynamo.graph_break()
        return {"logits": self.down(torch.relu(x))}


class Raising(Breaking):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if torch.compiler.is_compiling():
            raise ValueError("not while it is traced")
        return super().forward(x)


@pytest.mark.parametrize("model", [Breaking, Raising])
def test_what_cannot_be_compiled_stays_eager(small: Any, model: type[nn.Module]) -> None:
    case = small(model, ["up", "down"])
    cm, inputs, names = started(case), {"x": torch.randn(3, 12)}, ["a", None, "b"]
    for _ in range(2):
        served(cm, case, inputs, names)
    with pytest.warns(LorafxWarning, match="calls stay eager"):
        assert cm.wait(SECONDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)  # it was said
        for _ in range(2):
            served(cm, case, inputs, names)
    assert tiers(cm) == ["kept eager"]
    (kind,) = cm.status().kinds
    assert kind.reason in str(cm.status())
    assert len(kind.reason) < 400
    assert "from user code" not in kind.reason
    assert processes(cm) == []
    assert cm.recompiles == 0


@pytest.mark.parametrize(
    ("function", "number"),
    [("os.fork", errno.ENOMEM), ("os.pipe", errno.EMFILE), ("tempfile.mkdtemp", errno.ENOENT)],
)
def test_calls_are_answered_where_no_process_can_be_made(
    plain: Case, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, "nothing is left")

    cm, inputs = started(plain), plain_inputs(3, 5)
    opened = len(os.listdir("/proc/self/fd"))
    served(cm, plain, inputs)
    monkeypatch.setattr(function, fail)
    with pytest.warns(LorafxWarning, match="nothing is left"):
        served(cm, plain, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)  # it was said
        served(cm, plain, inputs)
    assert len(os.listdir("/proc/self/fd")) <= opened + 1  # that of the private folder
    assert tiers(cm) == ["kept eager"]
    assert "no process that compiles could be started" in cm.status().kinds[0].reason


def test_a_call_that_is_wrong_is_no_failure_of_the_compiler(plain: Case) -> None:
    cm = started(plain)
    wrong = {"ids": torch.full((3, 5), 10_000)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", LorafxWarning)
        for _ in range(5):
            with pytest.raises(OutOfRangeError):
                cm(**wrong, adapter_names=NAMES)
            assert cm.wait(SECONDS)
    assert processes(cm) == []
    served(cm, plain, plain_inputs(3, 5))
    assert tiers(cm) == ["eager"]


class Starting(nn.Module):
    """Starts a thread, and counts OpenMP's threads there and here."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        with ThreadPoolExecutor(1) as threads:
            there = threads.submit(torch.get_num_threads).result()
        return {"logits": self.up(x), "threads": [torch.get_num_threads(), there]}


def test_a_thread_that_is_born_in_a_call_has_all_threads(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside.Process, "works", True)
    case = small(Starting, ["up"])
    cm, x, threads = started(case), torch.randn(3, 12), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for _ in range(2):
            counted = cm(x=x, adapter_names=["a"] * 3)["threads"]
        assert counted == [3, 4]  # one core is that of the process beside
        assert torch.get_num_threads() == 4
    finally:
        cm.detach()
        torch.set_num_threads(threads)


def test_what_cannot_be_saved_is_compiled_here_where_that_is_asked_for(small: Any) -> None:
    case = small(Breaking, ["up", "down"])
    cm, inputs = started(case, fallback="refuse"), {"x": torch.randn(3, 12)}
    for _ in range(2):
        served(cm, case, inputs, ["a"] * 3)
    assert cm.wait(SECONDS)
    assert cm.recompiles == 0
    served(cm, case, inputs, ["a"] * 3)
    assert cm.recompiles == 2
    assert tiers(cm) == ["ready"]


def test_calls_that_need_a_graph_wait_for_it(llama: Case) -> None:
    cm, inputs = started(llama), token_inputs(2, 4)
    slots = torch.tensor([[0, 0, -1, -1], [-1, 0, 0, 0]])
    cm(**inputs, adapter_names=["a0"], adapter_slots=slots)
    assert tiers(cm) == ["ready"]
    assert "compiled in this process" in cm.status().kinds[0].reason
    assert cm.recompiles == 1


class Sorting(nn.Module):
    """Which rows its result holds depends on their values."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor, flag: bool = False) -> dict[str, torch.Tensor]:
        return {"logits": self.up(x.gather(0, x[:, :1].argsort(0).expand_as(x)))}


def test_a_second_start_prepares_saved_graphs_first(
    plain: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call waits while generated code is imported."""
    cm, inputs = started(plain, cache=tmp_path), plain_inputs(3, 5)
    served(cm, plain, inputs)
    served(cm, plain, inputs)
    assert cm.wait(SECONDS)
    cm.detach()
    monkeypatch.setattr(saved_graphs, "_PREPARED", set())
    second = started(plain, cache=tmp_path)
    served(second, plain, inputs)
    assert tiers(second) == ["eager"]  # it was found, and is prepared
    assert second.wait(SECONDS)
    assert len(saved_graphs._PREPARED) == 1
    served(second, plain, inputs)
    assert tiers(second) == ["ready"]
    assert second.recompiles == 1
    assert next(iter(second._entries.tiers._kinds)).processes == 0


@pytest.mark.parametrize("end", ["a call needs a graph", "too many kinds"])
def test_a_process_that_nobody_needs(small: Any, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """It ends, and calls have all threads again."""
    case = small(Sorting, ["up"])
    cm, x = started(case), torch.randn(3, 12)
    for _ in range(2):
        cm(x=x, adapter_names=["a"] * 3)
    (pid,) = processes(cm)
    if end == "too many kinds":
        monkeypatch.setattr("lorafx.runtime.kinds._MOST", 1)
        cm(x=x, flag=True, adapter_names=["a"] * 3)
    else:
        with pytest.raises(ProvenanceError):
            cm(x=x, adapter_names=["a", None, "b"])
    assert not running(pid)
    assert processes(cm) == []


@pytest.mark.slow
def test_generate(llama: Case) -> None:
    cm = started(llama)
    prompts = {**token_inputs(3, 4), "max_new_tokens": 6, "do_sample": False}
    names = ["a0", None, "a1"]
    want = cm.generate(**prompts, adapter_names=names)
    assert tiers(cm) == ["eager", "compiling"]  # the prompt came once
    for _ in range(2):
        assert torch.equal(cm.generate(**prompts, adapter_names=names), want)
        assert cm.wait(SECONDS)
    assert torch.equal(cm.generate(**prompts, adapter_names=names), want)
    assert tiers(cm) == ["ready", "ready"]
    assert cm.recompiles == 2


@pytest.mark.parametrize("number", few([signal.SIGKILL, signal.SIGTERM], signal.SIGKILL))
def test_a_process_that_is_killed(plain: Case, number: signal.Signals) -> None:
    cm, inputs = started(plain), plain_inputs(3, 5)
    served(cm, plain, inputs)
    for delay in (0.0, 0.2):
        served(cm, plain, inputs)
        (pid,) = processes(cm)
        time.sleep(delay)
        os.kill(pid, number)
        assert cm.wait(SECONDS)
        assert not running(pid)
        assert tiers(cm) == ["eager"]
    served(cm, plain, inputs)
    assert cm.wait(SECONDS)
    served(cm, plain, inputs)
    assert tiers(cm) == ["ready"]


def test_a_terminal_shows_what_is_compiled(
    plain: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cm, inputs = started(plain), plain_inputs(3, 5)
    served(cm, plain, inputs)
    served(cm, plain, inputs)
    line = f"lorafx: compiling {cm.status().kinds[0].kind}, beside the calls"
    assert cm.wait(SECONDS)
    shown, ended = (text for text in capsys.readouterr().err.splitlines() if "beside" in text)
    assert shown == f"{line} ..."
    assert ended.startswith(f"{line}: ")
    assert "calls: ready" in str(cm.explain())


def test_calls_of_another_thread(plain: Case) -> None:
    cm, inputs = started(plain), plain_inputs(3, 5)

    def in_thread() -> None:  # torch's settings of the main thread are not those of others
        with ThreadPoolExecutor(1) as threads:  # which ends before the process does
            threads.submit(served, cm, plain, inputs).result()

    in_thread()
    in_thread()
    assert cm.wait(SECONDS)
    in_thread()
    assert tiers(cm) == ["ready"]


def test_wait_ends_after_its_time(plain: Case) -> None:
    cm, inputs = started(plain), plain_inputs(3, 5)
    assert cm.wait(0)
    served(cm, plain, inputs)
    served(cm, plain, inputs)
    (pid,) = processes(cm)
    os.kill(pid, signal.SIGSTOP)
    assert not cm.wait(0.1)
    served(cm, plain, inputs)
    os.kill(pid, signal.SIGCONT)
    assert cm.wait(SECONDS)


@pytest.mark.parametrize("end", ["detach", "garbage"])
def test_nothing_is_left_of_a_model_that_ends(plain: Case, end: str) -> None:
    cm, inputs = started(plain), plain_inputs(3, 5)
    served(cm, plain, inputs)
    served(cm, plain, inputs)
    (pid,), folder = processes(cm), os.fspath(cm._entries.tiers.compilers.folder)
    assert running(pid)
    if end == "detach":
        cm.detach()
    del cm
    gc.collect()
    assert not running(pid)
    assert not os.path.exists(folder)


def test_another_fork_leaves_the_process_alone(plain: Case) -> None:
    cm, inputs = started(plain), plain_inputs(3, 5)
    served(cm, plain, inputs)
    served(cm, plain, inputs)
    before, folder = processes(cm), os.fspath(cm._entries.tiers.compilers.folder)
    torch.set_num_threads(1)  # the threads of an OpenMP pool do not exist in a child
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(60)
            assert tiers(cm) == ["eager"]
            assert cm.wait(0)
            served(cm, plain, inputs)
            cm.detach()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert os.path.exists(folder)
    assert processes(cm) == before
    assert cm.wait(SECONDS)
    served(cm, plain, inputs)
    assert cm.status().count("kept eager") == 0


def test_weights_and_adapters_change_meanwhile(plain: Case) -> None:
    cm, inputs = started(plain), plain_inputs(3, 5)
    served(cm, plain, inputs)
    served(cm, plain, inputs)
    changed = {name: value + 0.1 for name, value in plain.base.state_dict().items()}
    cm.load_weights(changed)
    cm.load_adapter(plain.folders["a2"], "a0")
    other = Case(plain.model(), {"a0": plain.folders["a2"], "a1": plain.folders["a1"]})
    other.base.load_state_dict(changed)
    assert cm.wait(SECONDS)
    served(cm, other, inputs)
    check_mixed(cm, other, ["a0", None, "a1"], inputs)
    assert tiers(cm) == ["ready"]


def test_large_packs_are_shared(plain: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafx.runtime.beside.compilers._COPIED", 0)
    cm, inputs = started(plain), plain_inputs(3, 5)
    packs = cm._session.program.pack_watch
    served(cm, plain, inputs)
    assert not packs.intact
    served(cm, plain, inputs)
    assert packs.intact
    cm.detach()


def ended(process: Process) -> str | None:
    """What a process reports, which is waited for."""
    last = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < last:
        time.sleep(0.01)
    process.end()
    return process.outcome


@pytest.mark.parametrize("patience", [1e9, 0.0])
def test_it_works_when_the_serving_process_rests(
    patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, rests = itertools.count(), mmap.mmap(-1, 1)
    monkeypatch.setattr(beside, "PATIENCE", patience)
    monkeypatch.setattr(
        beside, "_seconds_used", lambda _: 0.0 if rests[0] else float(next(seconds))
    )
    process = Process(lambda: "done")
    process.start()
    if patience:
        time.sleep(3 * beside._LOOK_AT_REST)
        assert not process.works
        assert process.poll() is None
        rests[0] = 1
    assert ended(process) == "done"
    assert process.works


@pytest.mark.parametrize("behind", [True, False])
def test_calls_go_first(behind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process and its compilers take what calls leave, or little."""
    for name, value in PRIORITIES.items():
        monkeypatch.setattr(beside, name, value)
    child = "import os; print(os.sched_getscheduler(0), os.nice(0))"

    def policies() -> str:
        own = os.sched_getscheduler(0), os.nice(0)
        text = subprocess.check_output([sys.executable, "-c", child], text=True)
        return f"{own[0]} {own[1]} {text}"

    process = Process(policies)
    process.start(behind=behind)
    outcome = ended(process)
    assert outcome is not None
    policy = os.SCHED_IDLE if behind else os.SCHED_OTHER
    assert outcome.split() == [str(policy), str(os.nice(0) + beside._NICE)] * 2
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_it_gives_up_when_nothing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that nobody releases is no work."""
    monkeypatch.setattr(beside, "_STANDSTILL", 1.0)
    monkeypatch.setattr(beside, "_LOOK", 0.1)
    process = Process(lambda: str(threading.Event().wait()))
    process.start()
    assert ended(process) == "the process beside ended without a word"


def test_a_compiler_that_works_is_work() -> None:
    """What a process has used counts while it runs, also below a process that waits for it."""
    busy = "import time\nwhile True: time.process_time()"
    waits = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {busy!r}])"
    with subprocess.Popen([sys.executable, "-c", waits], start_new_session=True) as child:
        last = time.monotonic() + SECONDS
        while beside._seconds_of_all(child.pid) < 1 and time.monotonic() < last:
            time.sleep(0.05)
        own, all_of_them = beside._seconds_used(child.pid), beside._seconds_of_all(child.pid)
        os.killpg(child.pid, signal.SIGKILL)
    assert own < 1 <= all_of_them


def _product(size: int) -> str:
    """A product that takes several threads, and how many there were."""
    x = torch.ones(size, size)
    return f"{float((x @ x + x)[-1, -1]):.0f} {torch.get_num_threads()}"


def test_threads_of_openmp() -> None:
    """The process has threads of its own, where those of the serving one would never answer."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert _product(700) == "701 4"
        process = Process(lambda: _product(700))
        process.start()
        assert ended(process) == "701 4"
    finally:
        torch.set_num_threads(threads)


SCRIPT = """
import os, signal, sys
import torch
from torch import nn
import lorafx

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return {"logits": self.down(torch.relu(self.up(x)))}

options = {"lowering": "reference", "start": "eager", "cache": None}
cm = lorafx.compile(Model().eval(), lorafx.LoraConfig(["up", "down"]), options=options)
for _ in range(2):
    cm(torch.randn(3, 12))
compilers = cm._entries.tiers.compilers
print(*(process.pid for process in compilers.processes), os.fspath(compilers.folder), flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "terminated":
    os.kill(os.getpid(), signal.SIGTERM)
if sys.argv[1] == "interrupted":
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    "way",
    few(["killed", "ended", "interrupted", "terminated"], "killed"),  # it cannot clean up
)
def test_no_process_outlives_the_serving_one(way: str) -> None:
    command = [sys.executable, "-c", SCRIPT, way]
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    pid, folder = result.stdout.split()
    last = time.monotonic() + (30 if way in ("terminated", "killed") else 0)
    while running(int(pid)) and time.monotonic() < last:
        time.sleep(0.05)
    assert not running(int(pid))
    assert not os.path.exists(folder)


def test_folders_that_are_left_over_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    used, left, new = PrivateFolder(), tmp_path / "lorafx-graphs-left", tmp_path / "lorafx-graphs-n"
    other = tmp_path / "lorafx-other"
    for folder in (left, new, other):
        folder.mkdir()
        (folder / "file").touch()
    for folder in (Path(used), left, other):
        os.utime(folder, (1, 1))
    following = Path(PrivateFolder())
    assert {*tmp_path.iterdir()} == {Path(used), new, other, following} - {following}
