"""Regular expressions over module paths, matched in bounded time.

    P(i) → {j : the pattern matches path[i:j]},   all i at once, as the bits of one integer

Patterns in adapters are not trusted, and `re` backtracks: `(a|a)*b` on a path of thirty letters
takes minutes. Whether a pattern matches at all does not depend on the order in which its ways are
tried, so each element maps the set of positions that are reached before it to the set after it. A
repeat goes on until nothing new is reached; a look-around is a set of positions by itself, found by
running its body the other way. A step is an operation on an integer of len(path) bits, and `cost`
is a bound on the steps of one match.

What depends on what a group has matched (back-references, conditions, atomic groups, possessive
repeats) is refused, and so is what costs too much.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

from lorafx.errors import ConfigError

_parser: Any = importlib.import_module("re._parser")

#: Longest pattern. The standard library's parser takes time quadratic in the length of a prefix
#: that alternatives share.
LONGEST = 1 << 15
#: Most steps of one match, of a path as long as `_PATH`: some milliseconds. A full list of a
#: large model's modules as alternatives takes a third of it.
MOST_STEPS = 1 << 16
_PATH = 256
_DEEPEST = 40
# Steps to follow a run of one kind of characters, by doubling.
_RUN = 10

_FLAGS = re.UNICODE | re.IGNORECASE | re.DOTALL | re.VERBOSE | re.ASCII
_CATEGORIES = {
    _parser.CATEGORY_DIGIT: r"\d",
    _parser.CATEGORY_NOT_DIGIT: r"\D",
    _parser.CATEGORY_SPACE: r"\s",
    _parser.CATEGORY_NOT_SPACE: r"\S",
    _parser.CATEGORY_WORD: r"\w",
    _parser.CATEGORY_NOT_WORD: r"\W",
}
_UNBOUNDED_ORDER = {
    _parser.GROUPREF: "a back-reference",
    _parser.GROUPREF_EXISTS: "a condition on a group",
    getattr(_parser, "ATOMIC_GROUP", None): "an atomic group",
    getattr(_parser, "POSSESSIVE_REPEAT", None): "a possessive repeat",
}


class PatternError(ConfigError):
    """A str that is no regular expression, or one whose matching is not bounded.

    The message begins with the verb: "is not a regular expression: ..."
    """


class Pattern:
    """A regular expression over paths.

    Attributes:
        text: as it was given.
        cost: steps that one match takes at most.
        tail: what every path that it matches up to its end ends with, "" where that varies.

    Raises:
        PatternError: see there.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise PatternError(
                f"has {len(text)} characters, and patterns may have {LONGEST}; give a list of "
                "module names instead"
            )
        try:
            parsed = _parser.parse(text)
        except (re.error, OverflowError, ValueError, Warning) as error:
            raise PatternError(
                f"is not a regular expression: {getattr(error, 'msg', error)}"
            ) from error
        except RecursionError:
            parsed = None
        if parsed is None:  # outside of the handler, whose traceback is as deep as the stack
            raise PatternError(f"has groups nested deeper than {_DEEPEST}")
        self.text = text
        self._root = _built(parsed, parsed.state.flags, 0)
        self.cost = self._root.cost
        self.tail = _tail(self._root)[0]
        if self.cost > MOST_STEPS:
            raise PatternError(
                f"may take {self.cost} steps for each module, more than {MOST_STEPS}: it "
                "nests repeats, or has too many alternatives; give a list of module names "
                "instead"
            )

    def matches(self, path: str) -> bool:
        """`re.match(text, path)` is not None."""
        return self._root.after(_Text(path), 1, False) != 0

    def fullmatches(self, path: str) -> bool:
        """`re.fullmatch(text, path)` is not None."""
        return bool(self._root.after(_Text(path), 1, False) >> len(path))


@lru_cache(maxsize=64)
def pattern(text: str) -> Pattern:
    """The `Pattern` of a text that many paths are compared with."""
    return Pattern(text)


class _Text:
    """A path, and the positions of each of its characters as bits."""

    def __init__(self, path: str) -> None:
        self.path, self.size = path, len(path)
        self.everywhere = (1 << self.size + 1) - 1
        self.at: dict[str, int] = {}
        self.found: dict[int, int] = {}  # what each `_Class` accepts, by identity
        for index, char in enumerate(path):
            self.at[char] = self.at.get(char, 0) | 1 << index


class _Element:
    """Part of a pattern."""

    cost = 1

    def after(self, text: _Text, at: int, back: bool) -> int:
        """Where it ends that starts at one of the positions `at`; where it starts that ends there,
        if `back`."""
        raise NotImplementedError


class _Character(_Element):
    """One character."""

    def found(self, text: _Text) -> int:
        """Where the path has one that fits."""
        raise NotImplementedError

    def after(self, text: _Text, at: int, back: bool) -> int:
        return at >> 1 & self.found(text) if back else (at & self.found(text)) << 1


class _Literal(_Character):
    def __init__(self, char: str) -> None:
        self.char = char

    def found(self, text: _Text) -> int:
        return text.at.get(self.char, 0)


class _Class(_Character):
    """Any character that `test` accepts."""

    def __init__(self, test: Callable[[str], bool], cost: int = 1) -> None:
        self.test, self.cost = test, cost
        self.known: dict[str, bool] = {}

    def found(self, text: _Text) -> int:
        if id(self) not in text.found:
            bits = 0
            for char, places in text.at.items():
                if char not in self.known:
                    self.known[char] = self.test(char)
                if self.known[char]:
                    bits |= places
            text.found[id(self)] = bits
        return text.found[id(self)]


@dataclass
class _Sequence(_Element):
    items: Sequence[_Element]

    def __post_init__(self) -> None:
        self.cost = 1 + sum(item.cost for item in self.items)

    def after(self, text: _Text, at: int, back: bool) -> int:
        for item in reversed(self.items) if back else self.items:
            at = item.after(text, at, back)
            if not at:
                return 0
        return at


@dataclass
class _Alternatives(_Element):
    items: Sequence[_Element]

    def __post_init__(self) -> None:
        self.cost = 1 + sum(item.cost for item in self.items)

    def after(self, text: _Text, at: int, back: bool) -> int:
        found = 0
        for item in self.items:
            found |= item.after(text, at, back)
        return found


@dataclass
class _Repeat(_Element):
    """`item` at least `least` times and at most `most`, None for any number."""

    item: _Element
    least: int
    most: int | None

    def __post_init__(self) -> None:
        rounds = _PATH if self.most is None else min(self.most, _PATH)
        run = isinstance(self.item, _Character) and self.most is None
        self.cost = min(self.least, _PATH) * self.item.cost
        self.cost += _RUN if run else rounds * self.item.cost

    def after(self, text: _Text, at: int, back: bool) -> int:
        for _ in range(self.least):
            # Paths only lead on, so what is reached stays the same from some round on.
            before, at = at, self.item.after(text, at, back)
            if at == before or not at:
                break
        if self.most is None and isinstance(self.item, _Character):
            return _run(self.item.found(text), at, text, back)
        new, rounds = at, text.size + 1
        for _ in range(rounds if self.most is None else min(rounds, self.most - self.least)):
            new = self.item.after(text, new, back) & ~at
            if not new:
                break
            at |= new
        return at


@dataclass
class _Where(_Element):
    """An assertion that is true at some positions, whatever stands before it."""

    places: Callable[[_Text], int]
    cost: int = 1

    def after(self, text: _Text, at: int, back: bool) -> int:
        return at & self.places(text)


def _run(found: int, at: int, text: _Text, back: bool) -> int:
    """`at`, and all that characters at `found` lead on to, one after another."""
    if found + 1 == 1 << text.size:
        if back:
            return (1 << at.bit_length()) - 1
        return text.everywhere & -(at & -at)
    way, step = (found if back else found << 1), 1
    while step <= text.size:
        at |= way & (at >> step if back else at << step)
        way &= way >> step if back else way << step
        step *= 2
    return at


def _built(parsed: Any, flags: int, depth: int) -> _Element:
    """The element of a parsed pattern."""
    if depth > _DEEPEST:
        raise PatternError(f"has groups nested deeper than {_DEEPEST}")
    if flags & ~_FLAGS:
        raise PatternError("sets flags other than i, s, x, u and a")
    items = [_element(kind, value, flags, depth) for kind, value in parsed]
    return items[0] if len(items) == 1 else _Sequence(items)


def _element(kind: Any, value: Any, flags: int, depth: int) -> _Element:
    def inner(parsed: Any, own: int = flags) -> _Element:
        return _built(parsed, own, depth + 1)

    if kind is _parser.BRANCH:
        return _Alternatives([inner(item) for item in value[1]])
    if kind is _parser.SUBPATTERN:
        _, added, removed, parsed = value
        return inner(parsed, (flags | added) & ~removed)
    if kind in (_parser.MAX_REPEAT, _parser.MIN_REPEAT):
        least, most, parsed = value
        return _Repeat(inner(parsed), least, None if most is _parser.MAXREPEAT else most)
    if kind in (_parser.ASSERT, _parser.ASSERT_NOT):
        direction, parsed = value
        return _look(inner(parsed), back=direction < 0, wanted=kind is _parser.ASSERT)
    if kind is _parser.AT:
        return _Where(_position(value, flags))
    if kind in _UNBOUNDED_ORDER:
        raise PatternError(f"holds {_UNBOUNDED_ORDER[kind]}, which lorafx does not match")
    if kind is getattr(_parser, "FAILURE", None):
        return _Alternatives([])
    return _character(kind, value, flags)


def _look(body: _Element, *, back: bool, wanted: bool) -> _Where:
    def places(text: _Text) -> int:
        # Where a body starts that ends anywhere, or the other way round.
        found = body.after(text, text.everywhere, not back)
        return found if wanted else text.everywhere & ~found

    return _Where(places, 1 + body.cost)


def _position(kind: Any, flags: int) -> Callable[[_Text], int]:
    if kind in (_parser.AT_BEGINNING, _parser.AT_BEGINNING_STRING):
        return lambda text: 1
    if kind is _parser.AT_END_STRING:
        return lambda text: 1 << text.size
    if kind is _parser.AT_END:
        return lambda text: 1 << text.size | (1 << text.size >> 1 if text.path[-1:] == "\n" else 0)
    if kind not in (_parser.AT_BOUNDARY, _parser.AT_NON_BOUNDARY):
        _unknown(kind)
    word = _Class(_test(_parser.CATEGORY, _parser.CATEGORY_WORD, flags))

    def boundary(text: _Text) -> int:
        words = word.found(text)
        if not text.size:
            return 0  # neither is anywhere in an empty string
        edges = (words ^ words << 1) & text.everywhere
        return edges if kind is _parser.AT_BOUNDARY else text.everywhere & ~edges

    return boundary


def _character(kind: Any, value: Any, flags: int) -> _Character:
    if kind is _parser.ANY:
        return _Class((lambda char: True) if flags & re.DOTALL else (lambda char: char != "\n"))
    if kind is _parser.LITERAL and not flags & re.IGNORECASE:
        return _Literal(chr(value))
    if kind is _parser.NOT_LITERAL:
        same = _test(_parser.LITERAL, value, flags)
        return _Class(lambda char: not same(char))
    if kind is not _parser.IN:
        return _Class(_test(kind, value, flags))
    negated = value[0][0] is _parser.NEGATE
    tests = [_test(of, item, flags) for of, item in value[negated:]]
    return _Class(lambda char: any(test(char) for test in tests) != negated, len(tests))


def _test(kind: Any, value: Any, flags: int) -> Callable[[str], bool]:
    """Whether a character is of one kind that stands in brackets."""
    if kind is _parser.CATEGORY:
        accepts = re.compile(_CATEGORIES[value], re.ASCII if flags & re.ASCII else 0).match
        return lambda char: accepts(char) is not None
    if kind not in (_parser.LITERAL, _parser.RANGE):
        _unknown(kind)
    low, high = value if kind is _parser.RANGE else (value, value)
    if not flags & re.IGNORECASE:
        return lambda char: low <= ord(char) <= high
    return lambda char: any(
        len(c) == 1 and low <= ord(c) <= high for c in (char, char.lower(), char.upper())
    )


def _unknown(kind: Any) -> NoReturn:
    raise PatternError(f"holds {kind}, which lorafx does not match")


def _tail(element: _Element) -> tuple[str, bool]:
    """The literal characters that an element ends with, and whether it is nothing else."""
    if isinstance(element, _Literal):
        return element.char, True
    tail = ""
    if isinstance(element, _Sequence):
        for item in reversed(element.items):
            own, whole = _tail(item)
            tail = own + tail
            if not whole:
                return tail, False
        return tail, True
    return tail, False
