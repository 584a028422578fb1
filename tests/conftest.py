"""Models with adapters on disk and their oracle, each built once a session."""

from __future__ import annotations

import cheap_captures  # noqa: F401  # isort: skip

import gc
import os
import signal
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import peft
import psutil
import pytest
import torch
from both_roads import install, one_road
from dense_merge import REFERENCE, Case, build_case, case_by_targets
from hypothesis import HealthCheck, settings
from tiny_models import FAMILIES
from torch import nn
from torch.fx.experimental import _config as shape_config

import lorafx
import lorafx.capture.backend  # and with it all ops, which tests call by their names
from lorafx.capture.lowering import NodeByNode
from lorafx.compiled_model.compiled import CompiledModel
from lorafx.integrations.torch_compile import attached as attaching
from lorafx.program import promises
from lorafx.runtime import session
from lorafx.runtime.beside import process
from lorafx.runtime.beside.compilers import Compilers

#: Of each family, targets of the adapter "idle", which is saved as PEFT initialises it: B = 0.
IDLE = {"llama": ["q_proj", "down_proj"], "vit": ["fc1", "q_proj"], "plain": ["up", "head"]}
NAMES = ["a1", None, "a0", "idle"]


class Looked:
    """A compiled model that has served one mixed batch, and one of the base."""

    def __init__(self, case: Case, family: str, folder: Path) -> None:
        self.case, self.family = case, family
        wrapped = peft.get_peft_model(
            case.model(), peft.LoraConfig(r=3, target_modules=_targets(case, IDLE[family]))
        )
        wrapped.save_pretrained(str(folder))
        names = {name: case.folders[name] for name in ("a0", "a1", "a3")}
        config = lorafx.LoraConfig(max_rank=8, max_adapters=4)
        # For any sizes whichever file asks first: some files compile for fixed ones by default.
        self.cm = lorafx.compile(
            case.model(),
            config,
            adapters={**names, "idle": folder},
            dynamic=True,
            options=REFERENCE,
        )
        self.inputs = FAMILIES[family].inputs(len(NAMES), 5)
        self.output = self.cm(**self.inputs, adapter_names=NAMES)["logits"]
        self.cm(**self.inputs)


def _targets(case: Case, names: list[str]) -> list[str]:
    """Those of the names that the model has, or all its linears."""
    have = {path.rpartition(".")[2] for path, _ in case.base.named_modules()}
    return [name for name in names if name in have] or ["dense"]


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Graphs are captured anew, except in tests that give `Options.cache` or unset this.
os.environ["LORAFX_CACHE_BYTES"] = "0"
# And by the calls themselves, except in tests of `Options.start`.
os.environ.setdefault("LORAFX_START", "compiled")

# A shell has what it runs in the background ignore SIGINT, which some tests raise.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish() -> None:
    """pytest collects garbage five times when it ends, each time among ten million objects."""
    gc.freeze()


# How long an example takes is the machine's affair. Fixtures that give folders serve all examples.
settings.register_profile(
    "tests",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")

#: What captures graphs, and has `dynamic`.
_CAPTURING = (lorafx.compile, lorafx.sampler)


def _capture(*, any_sizes: bool) -> None:
    for entry in _CAPTURING:
        cast(Any, entry).__kwdefaults__["dynamic"] = any_sizes
    # `lorafx.attach` always captures for any.
    made = lambda *parts, dynamic: CompiledModel(*parts, dynamic=any_sizes)  # noqa: E731
    cast(Any, attaching).CompiledModel = made


# Graphs are captured for the sizes of the first call, at half the cost of graphs for any batch size
# and length, except in tests marked `any_sizes`, or that say `dynamic`.
_capture(any_sizes=False)

install()
#: Whatever a pass promises is checked after it and after those behind.
promises.CHECK_ALL = True


@pytest.fixture(autouse=True)
def _roads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Calls run in eager mode, too, and are compared, except in tests marked `one_road`: they count
    what a call does, or put a fault into one road."""
    if request.node.get_closest_marker("one_road") is None:
        yield
    else:
        with one_road():
            yield


@contextmanager
def _sizes_of(node: Any) -> Iterator[None]:
    before = cast(Any, lorafx.compile).__kwdefaults__["dynamic"]
    _capture(any_sizes=node.get_closest_marker("any_sizes") is not None)
    yield
    _capture(any_sizes=before)


@pytest.fixture(autouse=True, scope="module")
def _sizes(request: pytest.FixtureRequest) -> Iterator[None]:
    with _sizes_of(request.node):
        yield


@pytest.fixture(autouse=True)
def _sizes_of_test(_sizes: None, request: pytest.FixtureRequest) -> Iterator[None]:
    with _sizes_of(request.node):
        yield


@pytest.fixture(autouse=True)
def _compilers_have_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests wait for graphs of processes beside. As those run for users, they stand still while
    tests of another process take all cores."""
    monkeypatch.setattr(process, "_go_behind", lambda: None)
    monkeypatch.setattr(process, "_NICE", 0)


#: Sessions made since the last collection.
_MADE = Counter[str]()
#: What lorafx and Dynamo set while they capture.
_SETTINGS: tuple[tuple[Any, str], ...] = (
    (shape_config, "use_duck_shape"),
    (torch._dynamo.config, "fail_on_recompile_limit_hit"),
    (torch._dynamo.config, "specialize_float"),
)


@pytest.fixture(autouse=True)
def _torch_state() -> Iterator[None]:
    """Tests that interrupt leave nothing of that to others. An interrupt inside of torch's own code
    may leave gradients off, its settings changed, or its dispatcher in a mode that has ended."""
    gradients = torch.is_grad_enabled()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    settings = [(config, name, getattr(config, name)) for config, name in _SETTINGS]
    yield
    gc.enable()
    torch.set_grad_enabled(gradients)
    for config, name, value in settings:
        setattr(config, name, value)
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    for key in (torch._C.DispatchKey.Python, torch._C.DispatchKey.PythonTLSSnapshot):
        torch._C._dispatch_tls_set_dispatch_key_included(key, False)
    assert torch._C._dispatch_tls_local_exclude_set() == excluded  # else operators lose gradients


@pytest.fixture(autouse=True, scope="module")
def _few_models() -> Iterator[None]:
    """Merges and new base weights look through all models that are served, which took nine tenths
    of their time: those of earlier files are not among them. Dynamo's caches keep these alive, and
    a collection takes a minute, so it is made where memory runs short and there is much to collect.

    What earlier files left is frozen: each collection by Python itself, in the middle of some test,
    went through ten million objects of theirs, which took five seconds."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_SESSIONS", weakref.WeakValueDictionary())
        yield
        _MADE["sessions"] += len(session.sessions())
    if _MADE["sessions"] > 200 and psutil.virtual_memory().percent > 60:
        torch._dynamo.reset()
        gc.unfreeze()
        gc.collect()
        _MADE.clear()


@pytest.fixture
def earlier_objects_frozen() -> None:
    """For tests that start engines: each that stops collects garbage twice, which takes seconds
    each among all that earlier tests of the file left too."""
    gc.freeze()


@pytest.fixture(scope="class")
def in_eager_mode() -> Iterator[None]:
    """What the test compiles answers without graphs, and makes none beside: at a tenth of the cost,
    where graphs are not the point. (Of a class, so that a test outside of one has it before the
    fixtures that compile, and Hypothesis takes it.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFX_START", "eager")
        patch.setattr(Compilers, "consider", lambda *_: False)
        yield


def _road(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where what is compiled answers: in eager mode, and slowly in graphs. For what is dear in
    graphs, and shown there more cheaply by another test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFX_START", request.param)
        yield request.param


_ROADS = ["eager", pytest.param("compiled", marks=pytest.mark.slow)]
road = pytest.fixture(scope="class", params=_ROADS)(_road)
#: For files all of whose tests have it: it holds until the file ends.
road_of_module = pytest.fixture(scope="module", params=_ROADS)(_road)


@pytest.fixture
def node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of `lowering="inductor"` run node by node after all passes, by the kernels that lorafx
    generates: Inductor's own code of what is around these costs ten seconds a graph."""
    from lorafx.torch_internals import inductor  # a second of imports

    monkeypatch.setattr(inductor, "compile_fx_inner", lambda gm, inputs, **_: NodeByNode(gm))


@pytest.fixture
def compiled_beside() -> None:
    """Calls in eager mode start processes that compile their graphs."""


@pytest.fixture(autouse=True)
def _nothing_beside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests do not wait for those graphs, and each process compiles for a second or more."""
    if "compiled_beside" not in request.fixturenames:
        monkeypatch.setattr(Compilers, "consider", lambda *_: False)


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """The `Case` of a family by name, with changes to its configuration."""
    cases: dict[object, Case] = {}

    def make(family: str, **changes: object) -> Case:
        key = (family, tuple(sorted(changes.items())))
        if key not in cases:
            cases[key] = build_case(family, tmp_path_factory.mktemp(family), **changes)
        return cases[key]

    return make


@pytest.fixture(scope="session")
def llama(case_of: Callable[..., Case]) -> Case:
    return case_of("llama")


@pytest.fixture(scope="session")
def plain(case_of: Callable[..., Case]) -> Case:
    return case_of("plain")


@pytest.fixture(scope="session")
def looked(
    case_of: Callable[..., Case], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Looked]:
    """The compiled model of a family, for what only looks at it: made once."""
    made: dict[str, Looked] = {}

    def of(family: str) -> Looked:
        if family not in made:
            case = case_of(family)
            made[family] = Looked(case, family, tmp_path_factory.mktemp(f"idle_{family}"))
        return made[family]

    return of


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Case]:
    """A `Case` of one module class: adapter "a" and "b" at the given targets."""

    def make(cls: type[nn.Module], a: list[str], b: list[str] | None = None, **config: Any) -> Case:
        torch.manual_seed(0)
        base = cls().eval().requires_grad_(False)
        return case_by_targets(base, tmp_path, {"a": a, "b": b or a}, **config)

    return make
