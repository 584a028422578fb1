"""Room for calls as deep as those of a capture.

Since 3.11, Python keeps the frames of a thread in chunks of 16 KiB. The call that does not fit maps
a new chunk, and its return unmaps it. A loop at such a depth does that for each of its calls, and a
capture is hundreds of calls deep and full of loops: one of a Llama with two layers mapped 30,000
chunks, each a pair of system calls and a page fault. That was a tenth of a capture's time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

#: Values that a frame may hold at once. Python maps twice as much for a frame as large as this, and
#: the frames of its calls take the other half, a megabyte. Pages that nothing uses cost nothing.
_LARGE = 1 << 17


def with_room(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `call` returns; the frames inside of it share one chunk of memory."""
    return call(*args, **kwargs)


with_room.__code__ = with_room.__code__.replace(co_stacksize=_LARGE)
