"""What holds after a pass, as data: a promise says of which items it holds, and what is wrong with
one. Those about graphs are in `passes/spec.py`, those about models in `passes/model_spec.py`.

What always holds is checked in service, too. The rest is checked in tests, where graphs are dumped,
and under `Options(verify="numeric")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lorafx.config import Options, dump_folder
from lorafx.errors import VerifyError

S = TypeVar("S")

#: Whether every promise is checked, whatever the options are. Tests switch it on.
CHECK_ALL = False


@dataclass(frozen=True)
class Promise(Generic[S]):
    """What holds of a graph or a model.

    Attributes:
        says: the promise, in words.
        items: what it is about.
        wrong: what is wrong with an item, or "".
        since: the pass that makes the promise; "" if it always holds.
        until: the pass that ends it; "" if none does.
    """

    says: str
    items: Callable[[S], Iterable[Any]]
    wrong: Callable[[S, Any], str]
    since: str = ""
    until: str = ""

    def holds_after(self, passed: Sequence[str]) -> bool:
        """Whether it holds after these passes: one that is switched off promises nothing."""
        return (not self.since or self.since in passed) and self.until not in passed


def verify(
    promises: Iterable[Promise[S]], subject: S, passed: Sequence[str], options: Options
) -> None:
    """Raise VerifyError, which names the promise and the last of the passes that `passed`, if
    `subject` breaks a promise that holds after them."""
    fully = CHECK_ALL or options.verify == "numeric" or dump_folder(options) is not None
    for promise in promises:
        if not promise.holds_after(passed) or not (fully or not promise.since):
            continue
        for item in promise.items(subject):
            if wrong := promise.wrong(subject, item):
                made = f"of {promise.since!r}" if promise.since else "of every pass"
                raise VerifyError(
                    f'pass {passed[-1]!r} broke a promise {made}, "{promise.says}": {wrong}'
                )
