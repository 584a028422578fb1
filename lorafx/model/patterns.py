"""Regular expressions over module paths, matched against a clock.

Patterns in adapters are not trusted, and `re` backtracks: `(a|a)*b` on a path of thirty letters
takes minutes. The `regex` package means the same by a pattern, and stops when its time is up.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import regex

from lorafx.errors import ConfigError

#: Longest pattern: parsing takes time quadratic in the length of a prefix that alternatives share.
LONGEST = 1 << 15
#: Seconds of one match. Those that people write take microseconds.
SECONDS = 0.1
#: Largest product of a pattern's repeat counts: `regex` writes counted repeats out.
MOST_REPEATS = 1 << 16


class PatternError(ConfigError):
    """A str that is no regular expression, whose message begins with the verb, or one whose
    matching takes too long."""


class Pattern:
    """A regular expression over paths.

    Attributes:
        text: as it was given.
        tail: what every path that it matches whole ends with, as far as that is known.

    Raises:
        PatternError: see there.
    """

    def __init__(self, text: str, tail: str = "") -> None:
        if len(text) > LONGEST:
            raise PatternError(
                f"has {len(text)} characters, and patterns may have {LONGEST}; give a list of "
                "module names instead"
            )
        fault = None
        try:
            re.compile(text)  # `regex` takes more, which PEFT would refuse
            if math.prod(map(int, re.findall(r"(\d+)\}", text))) > MOST_REPEATS:
                raise PatternError(
                    f"repeats over {MOST_REPEATS} times what it holds; give a list of module names "
                    "instead"
                )
            self._compiled = regex.compile(text)
        except (re.error, regex.error, OverflowError, ValueError, Warning) as error:
            if isinstance(error, PatternError):
                raise
            raise PatternError(
                f"is not a regular expression: {getattr(error, 'msg', error)}"
            ) from error
        except RecursionError:
            fault = "has groups nested too deep"
        if fault is not None:  # outside of the handler, whose traceback is as deep as the stack
            raise PatternError(fault)
        self.text = text
        self.tail = tail

    def fullmatches(self, path: str) -> bool:
        """`re.fullmatch(text, path)` is not None.

        Raises:
            PatternError: it takes longer than SECONDS.
        """
        try:
            return self._compiled.fullmatch(path, timeout=SECONDS) is not None
        except TimeoutError:
            raise PatternError(
                f"the pattern {self.text!r:.120} takes over {SECONDS} seconds for one module "
                f"({path:.80}); give a list of module names instead"
            ) from None


@lru_cache(maxsize=64)
def pattern(text: str) -> Pattern:
    """The `Pattern` of a text that many paths are compared with."""
    return Pattern(text)
