"""What adapters of many replicas cost, simulated: slots and turns are lorafx's, time is a formula.

Each replica has an `AdapterStore` and the `Turns` of an engine, and holds at most so many adapters.
A request names an adapter by Zipf's law and goes to a replica; it has as many tokens as those of
adapter_queue.py, the prompt in its first step. A step of r requests with D adapters, of which m had
no slot, takes

    step · max(least, r / batch) + distinct · (D - 1) + load · m        seconds

An adapter that the replica does not hold is read beside the steps, in `read` seconds, before its
request is queued. `step` and `distinct` are fitted to the cases "base" and "fits" that
adapter_queue.py measured, `load` and `read` are what adapter_store.py measured. The case "queue" is
predicted, as a check.

    python benchmarks/adapter_scale.py [--adapters 100000] [--load 0.5] [--out results.json]
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import random
import statistics
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from adapter_queue import REQUESTS, UNDER_WAY, new_tokens
from adapter_store import Sizes
from protocol import save

from lorafx.adapter_store.store import AdapterStore
from lorafx.adapter_store.stored import Adapter, Hold, LoraWeights
from lorafx.generation.continuous.turns import Asked, Turns
from lorafx.package.stand_in import substitute_for

SIZES = Sizes()
RESULTS = Path(__file__).parent / "results"
#: A model of one tiny linear: what matters of an adapter is its name.
_SITE = {"path": "l", "kind": "linear", "dtype": "float32", "in": 1, "parts": {"l": 1}}
_FACTORS = LoraWeights(torch.ones(1, 1), torch.ones(1, 1), 1.0)


@dataclass(frozen=True)
class Costs:
    """Seconds, for a replica of so many slots whose steps have up to `batch` requests."""

    step: float
    distinct: float
    load: float
    read: float
    least: float = 0.5
    slots: int = 16
    batch: int = 32

    def of(self, rows: int, adapters: int, loads: int) -> float:
        base = self.step * max(self.least, rows / self.batch)
        return base + self.distinct * max(0, adapters - 1) + self.load * loads


@dataclass
class Request:
    name: str
    arrived: float
    new: int
    hold: Hold | None = None
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0

    @property
    def asked(self) -> Asked:
        assert self.hold is not None
        return Asked(self.hold.stored.version, self.hold.name, self.tokens > 0)


@dataclass
class Replica:
    """An engine and its store. `now` is its clock; requests are queued in order of time."""

    costs: Costs
    held: int
    now: float = 0.0
    reads: int = 0
    steps: int = 0
    adapters: int = 0  # of all steps
    turns: Turns = field(default_factory=Turns)
    begun: list[Request] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)
    reading: list[tuple[float, int, Request]] = field(default_factory=list)
    names: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        sizes = {"max_adapters": self.costs.slots, "max_rank": 1, "dtype": None, "prefix": ""}
        groups = substitute_for(
            {"modules": ["l"], "sites": [_SITE], "packed_modules": {}, **sizes}
        ).groups
        self.store = AdapterStore(groups, self.costs.slots)
        self._count = itertools.count().__next__

    @property
    def queued(self) -> int:
        return len(self.begun) + len(self.waiting) + len(self.reading)

    def hold(self, name: str) -> Hold:
        """Hold an adapter, which is loaded in place of the one that was asked for longest ago."""
        if name not in self.names:
            self.reads += 1
            self.store.load(Adapter(name, {"l": _FACTORS}, 1, ""))
            if len(self.names) == self.held:
                self.store.unload(self.names.popitem(last=False)[0])  # requests keep its version
        self.names[name] = None
        self.names.move_to_end(name)
        return self.store.hold(name)

    def add(self, request: Request) -> None:
        ready = request.arrived + (0.0 if request.name in self.names else self.costs.read)
        request.hold = self.hold(request.name)
        heapq.heappush(self.reading, (ready, self._count(), request))

    def run(self, until: float) -> None:
        """Steps that begin before `until`."""
        while True:
            if not self.begun and not self.waiting:
                if not self.reading:
                    return
                self.now = max(self.now, self.reading[0][0])
            if self.now >= until:
                return
            while self.reading and self.reading[0][0] <= self.now:
                self.waiting.append(heapq.heappop(self.reading)[2])
            if self.begun or self.waiting:
                self._step()

    def _step(self) -> None:
        queue = (*self.begun, *self.waiting)
        turn = self.turns.next((request.asked for request in queue), self.store)
        ready = (request for request in queue if turn.admits(request.asked))
        rows = list(itertools.islice(ready, self.costs.batch))
        names = [request.asked.name for request in rows]
        loads = self.store.loads
        self.store.acquire(names)
        self.now += self.costs.of(len(rows), len(set(names)), self.store.loads - loads)
        self.steps += 1
        self.adapters += len(set(names))
        for request in rows:
            request.tokens += 1
            request.first = request.first or self.now
        taken = set(map(id, rows))
        begun = [r for r in self.waiting if id(r) in taken]
        self.waiting = [r for r in self.waiting if id(r) not in taken]
        both = [*self.begun, *begun]
        self.begun = [r for r in both if r.tokens < r.new]
        for request in both:
            if request.tokens == request.new:
                request.hold, request.last = None, self.now
                self.ended.append(request)


def homes(name: str, replicas: int) -> list[int]:
    """Two replicas of an adapter, by its name (rendezvous hashing)."""
    order = sorted(range(replicas), key=lambda n: hashlib.blake2b(f"{n} {name}".encode()).digest())
    return order[:2]


def simulate(
    costs: Costs, *, adapters: int, replicas: int, held: int, load: float, routing: str, count: int
) -> dict[str, Any]:
    """`count` requests for each replica, at `load` of what replicas with one adapter would answer.

    Routing: "home" takes the less busy of an adapter's two homes, or the least busy replica where
    both have more than four batches to do; "any" the least busy of two at random.
    """
    rng = random.Random(5)
    weights = list(itertools.accumulate(1 / (k + 1) for k in range(adapters)))
    rate = load * replicas * costs.batch / SIZES.new / costs.step
    group = [Replica(costs, held) for _ in range(replicas)]
    place: dict[str, list[int]] = {}
    for number in range(adapters):  # they begin with the adapters that are asked for most
        wanted = range(replicas) if routing == "any" else homes(f"a{number}", replicas)
        hungry = [group[n] for n in wanted if len(group[n].names) < held]
        for replica in hungry:
            replica.hold(f"a{number}")
        if all(len(replica.names) == held for replica in group):
            break
    for replica in group:
        replica.names = OrderedDict(reversed(replica.names.items()))  # the first is dropped first
        replica.reads = 0
    now = 0.0
    for _ in range(count * replicas):
        now += rng.expovariate(rate)
        [number] = rng.choices(range(adapters), cum_weights=weights)
        name = f"a{number}"
        for replica in group:
            replica.run(now)
        if routing == "any":
            options = rng.sample(range(replicas), min(2, replicas))
        else:
            options = place.setdefault(name, homes(name, replicas))
            if min(group[n].queued for n in options) > 4 * costs.batch:
                options = list(range(replicas))
        group[min(options, key=lambda n: group[n].queued)].add(
            Request(name, now, new_tokens(rng, SIZES))
        )
    for replica in group:
        replica.run(float("inf"))
    return {
        "adapters": adapters,
        "replicas": replicas,
        "held": held,
        "load": load,
        "routing": routing,
    } | outcome(group)


def outcome(group: list[Replica]) -> dict[str, float]:
    ended = [request for replica in group for request in replica.ended]
    waits = [request.first - request.arrived for request in ended]
    answers = [request.last - request.arrived for request in ended]
    requests = sum(len(replica.ended) for replica in group)
    seconds = max(replica.now for replica in group)
    return {
        "tokens a second": sum(request.new for request in ended) / seconds,
        "wait p50": statistics.median(waits),
        "wait p99": statistics.quantiles(waits, n=100)[98],
        "answer p50": statistics.median(answers),
        "answer p99": statistics.quantiles(answers, n=100)[98],
        "loads": sum(replica.store.loads for replica in group) / requests,
        "reads": sum(replica.reads for replica in group) / requests,
    }


def closed(costs: Costs, adapters: int) -> Replica:
    """As adapter_queue.py: so many requests under way at any time in one engine."""
    rng, total = random.Random(3), 0
    weights = list(itertools.accumulate(1 / (k + 1) for k in range(adapters)))
    replica = Replica(costs, adapters)
    for number in range(adapters):
        replica.hold(f"a{number}")
    while len(replica.ended) < REQUESTS:
        while total < REQUESTS and replica.queued < UNDER_WAY * costs.batch:
            [number] = rng.choices(range(adapters), cum_weights=weights)
            replica.add(Request(f"a{number}", replica.now, new_tokens(rng, SIZES)))
            total += 1
        replica.run(replica.now + 1e-9)  # one step
    return replica


def speed_of(replica: Replica) -> float:
    return sum(request.new for request in replica.ended) / replica.now


def fit(measured: Mapping[str, Any], load: float, read: float) -> Costs:
    """Costs by the speed of "base", which has one adapter, and of "fits"."""
    costs = Costs(step=1.0, distinct=0.0, load=load, read=read)
    step = speed_of(closed(costs, 1)) / measured["base"]["tokens a second"]
    costs = replace(costs, step=step)
    replica = closed(costs, costs.slots)
    tokens = sum(request.new for request in replica.ended)
    seconds = tokens / measured["fits"]["tokens a second"]
    distinct = (seconds - replica.now) / (replica.adapters - replica.steps)
    return replace(costs, distinct=max(0.0, distinct))


def measured_rows(name: str) -> dict[str, Any]:
    rows = json.loads((RESULTS / name).read_text())["rows"]
    return {row["case"]: row for row in rows if row.get("arm") != "A/A"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=2000, help="of each replica")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--held", type=int, nargs="+", default=[64, 1000, 4000])
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--load", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    measured, store = measured_rows("adapter_queue.json"), measured_rows("adapter_store.json")
    costs = fit(measured, store["slot"]["p50_ms"] / 1e3, store["read"]["p50_ms"] / 1e3)
    print(costs)
    predicted = speed_of(closed(costs, 1000)) / measured["base"]["tokens a second"]
    kept = statistics.median(measured["queue"]["kept"])
    rows = [{"case": "a thousand adapters, one engine", "predicted": predicted, "measured": kept}]
    print(rows[0])
    cases = [(n, held, given.slots[0]) for n in given.replicas for held in given.held]
    cases += [(given.replicas[0], given.held[-1], slots) for slots in given.slots[1:]]
    for (replicas, held, slots), routing in itertools.product(cases, ("home", "any")):
        if routing == "any" and replicas == 1:
            continue
        settings = {"adapters": given.adapters, "replicas": replicas, "held": held}
        settings |= {"load": given.load, "count": given.requests}
        found = {"slots": slots} | simulate(
            replace(costs, slots=slots), routing=routing, **settings
        )
        rows.append(found)
        print({key: round(v, 3) if isinstance(v, float) else v for key, v in found.items()})
    if given.out is not None:
        save(given.out, f"{costs}, simulated", rows)


if __name__ == "__main__":
    main()
