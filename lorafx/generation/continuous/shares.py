"""Which waiting requests begin first, and how many of an adapter may run, where adapters have
shares.

Each adapter has a time, which every token that it runs while somebody waits advances by 1 / weight.
The waiting request of the earliest time begins first, as in start-time fair queueing. The prompts
before it in its adapter's queue count as if they had been run:

    waiting, with prompts of 6 tokens    times
    "sql", weight 3                      0   2   4   6
    "chat", weight 1                     0   6
    order                                sql chat sql sql sql chat

An adapter for which nothing has waited begins with the earliest time of those that wait, unless its
own is later: it cannot save up. If nobody has to wait, all times are equal again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lorafx.adapter_store.names import BASE, SUMS, as_number, check_name
from lorafx.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """What an adapter gets of the steps of an engine while others wait.

    Attributes:
        weight: its part of the tokens, prompts included, beside the weights of the others.
        most_running: how many of its requests may be under way; more of them wait, and hold nobody
            else up. None for any number.
    """

    weight: float = 1.0
    most_running: int | None = None


class Asking(NamedTuple):
    """A sequence: the account of its adapter, its request's name, the tokens of its next steps."""

    account: str
    request: str
    tokens: int = 0


class Shares:
    """The shares of one engine, and the times of its adapters."""

    def __init__(self) -> None:
        #: Account -> share. Other threads change it while it is read, one entry at a time.
        self.given: dict[str, Share] = {}
        self._times: dict[str, float] = {}
        #: The accounts that waited in the last step, and the earliest time of those that still do.
        self._waited: set[str] = set()
        self._now = 0.0

    def give(self, name: str | None, share: Share | None) -> None:
        """As `AdapterBatchingManager.set_share`."""
        account = BASE if name is None else name
        if account not in (BASE, SUMS):
            check_name(account)
        if share is None:
            self.given.pop(account, None)
        else:
            self.given[account] = checked_share(account, share)

    def order(self, waiting: Iterable[Asking], running: Iterable[Asking]) -> list[int]:
        """Which of the waiting sequences may begin, by their indices, in the order to begin."""
        begun: defaultdict[str, set[str]] = defaultdict(set)
        for account, request, _ in running:
            begun[account].add(request)
        queue: list[tuple[int, Asking]] = []
        for index, asking in enumerate(waiting):
            requests, most = begun[asking.account], self._share(asking.account).most_running
            if asking.request in requests or most is None or len(requests) < most:
                requests.add(asking.request)
                queue.append((index, asking))
        accounts = {asking.account for _, asking in queue}
        self._now = min((self._times[a] for a in accounts & self._waited), default=self._now)
        self._waited = accounts
        times = {a: max(self._times.get(a, 0.0), self._now) for a in accounts}
        self._times |= times
        keys: list[tuple[float, int]] = []
        for index, (account, _, tokens) in queue:
            keys.append((times[account], index))
            times[account] += tokens / self._share(account).weight
        return [index for _, index in sorted(keys)]

    def advance(self, scheduled: Iterable[tuple[str, int]], contended: bool) -> None:
        """Count the tokens of a step by accounts. `contended`: whether somebody still waits who may
        begin."""
        if not contended:
            self._times, self._waited, self._now = {}, set(), 0.0
            return
        for account, tokens in scheduled:
            time = self._times.get(account, self._now)
            self._times[account] = time + tokens / self._share(account).weight

    def _share(self, account: str) -> Share:
        return self.given.get(account) or Share()


def checked_share(name: str, share: object) -> Share:
    """`share`, which is to be that of `name`. Raises ConfigError if it cannot be."""
    if not isinstance(share, Share):
        raise ConfigError(f"the share of {name!r} is a lorafx.Share; got {share!r:.80}")
    weight, most = share.weight, share.most_running
    if not 0 < as_number(weight) < float("inf"):
        raise ConfigError(
            f"the share of {name!r} has weight={weight!r:.80}; a weight is a finite number above 0"
        )
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise ConfigError(
            f"the share of {name!r} has most_running={most!r:.80}; give an integer from 1 on, or "
            "None for no bound"
        )
    return share
