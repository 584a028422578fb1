"""Files at addresses of hosts that `--allowed-media-domains` names, bounded in bytes and time."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

#: Seconds that fetching a file may take.
MOST_SECONDS = 10.0
_PIECE = 1 << 16


class FetchError(Exception):
    """Why a file was not fetched, in words that follow its place in a request."""


class _NoRedirects(HTTPRedirectHandler):
    """Another address may be of a host that is not allowed."""

    def redirect_request(self, *_: Any) -> None:
        return None


def fetched(address: str, domains: Collection[str], most: int) -> bytes:
    """The file at an address, or its first `most` bytes. Waits ten seconds for a host to say
    anything, and for a whole file. Raises FetchError for another host, a redirect, or a file that
    is too slow."""
    try:
        parts = urlsplit(address)
        host = parts.hostname
    except ValueError as error:
        raise FetchError(f"{address!r:.60} is no address: {error}") from error
    if parts.scheme not in ("http", "https") or host not in [name.lower() for name in domains]:
        raise FetchError(
            f"its host {host!r:.80} is not one of --allowed-media-domains, from which alone http "
            "and https addresses are fetched; send a data URL"
        )
    deadline, data = time.monotonic() + MOST_SECONDS, b""
    try:
        request = Request(address, headers={"User-Agent": "lorafx"})
        with build_opener(_NoRedirects).open(request, timeout=MOST_SECONDS) as answer:
            while piece := answer.read1(min(_PIECE, most - len(data))):
                data += piece
                if time.monotonic() > deadline:
                    raise FetchError(f"it takes over {MOST_SECONDS:g} s to fetch")
    except FetchError:
        raise
    except Exception as error:  # of the network, the host or a library below
        raise FetchError(f"it cannot be fetched: {error!s:.200}") from error
    return data
