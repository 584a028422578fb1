"""Tested and refused versions of torch, triton, transformers and peft, without importing them.

At lorafx's entry points, a failure because of another version of torch becomes one error. Imports
of private names raise it (`private_names`). A name that is read later, or takes other arguments,
raises an AttributeError or a TypeError, which `entrance` converts.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata

from lorafx.errors import UnsupportedVersionError
from lorafx.progress import LOG

#: The tested versions, the oldest first; torch's with the version of triton in its builds.
TORCH = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8", "2.15": "3.9"}
TRANSFORMERS = ("5.0", "5.10", "5.23")
PEFT = ("0.18", "0.21")
TESTED = {"torch": tuple(TORCH), "transformers": TRANSFORMERS, "peft": PEFT}


def numbers(version: str) -> tuple[int, ...]:
    """`2.14.1+cpu` as (2, 14)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


@cache
def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch_minor() -> str:
    return ".".join(map(str, numbers(installed("torch") or "")))


def saves_graphs() -> bool:
    """Whether torch lets graphs be saved."""
    return numbers(installed("torch") or "") >= (2, 13)


def way_out() -> str:
    """A sentence for errors whose cause may be torch's version."""
    known = TESTED["torch"]
    if torch_minor() in known:
        return (
            f"this is torch {installed('torch')}, which lorafx was tested with, so torch was "
            "changed or lorafx is wrong: `lorafx doctor` says which parts of torch are missing; "
            f'pip install --force-reinstall "torch=={installed("torch")}" restores it'
        )
    return (
        f"this is torch {installed('torch')}, and lorafx was tested with {known[0]} to "
        f'{known[-1]}: install one of those (pip install "torch=={known[-2]}.*"), or a newer lorafx'
    )


def standing(package: str) -> str:
    """A package's version, and whether it was tested, for reports."""
    version = installed(package)
    if version is None:
        return "not installed"
    if package == "triton":
        needed = triton_of_torch() if installed("torch") else None
        return f"{version} (torch was built with {needed or 'one that it does not name'})"
    tested = TESTED[package]
    new, old = numbers(version) > numbers(tested[-1]), numbers(version) < numbers(tested[0])
    word = "untested; " * new + "too old; " * old
    return f"{version} ({word}tested: {', '.join(tested)})"


def triton_of_torch() -> str | None:
    """The version of triton that the installed torch was built with; None if it is not known."""
    for line in metadata.requires("torch") or ():
        if found := re.match(r"triton\s*==\s*([\d.]+)", line):
            return found[1]
    return TORCH.get(torch_minor())


@cache
def check() -> None:
    """Warn of a torch that is newer than tested, and of a triton that is not torch's own. Raises
    UnsupportedVersionError if a package is too old, or torch is not installed."""
    if installed("torch") is None:
        raise UnsupportedVersionError(
            f'lorafx needs torch: pip install "torch=={TESTED["torch"][-2]}.*"'
        )
    for package, tested in TESTED.items():
        version = installed(package)
        if version is None:
            continue
        if numbers(version) < numbers(tested[0]):
            raise UnsupportedVersionError(
                f"lorafx needs {package} {tested[0]} or later, and this is {package} {version}: "
                f'pip install "{package}>={tested[0]}"'
            )
        if package == "torch" and numbers(version) > numbers(tested[-1]):
            LOG.warning(
                "torch %s is untested: lorafx was tested with %s to %s. What leans on its insides "
                "is left out, so compiling may take longer; `lorafx doctor` shows what works",
                *(version, tested[0], tested[-1]),
            )
    if (mismatch := _triton_mismatch()) is not None:
        LOG.warning("%s. On a CPU no kernel of Triton's needs it", mismatch)


def _triton_mismatch() -> str | None:
    own, needed = installed("triton"), triton_of_torch()
    if own is None or needed is None or numbers(own) == numbers(needed):
        return None
    return (
        f"torch {installed('torch')} was built with triton {needed}, and this is triton {own}: "
        f'pip install "triton=={".".join(map(str, numbers(needed)))}.*"'
    )


@cache
def check_triton() -> None:
    """Raises UnsupportedVersionError if Triton's kernels cannot run: triton is not torch's own."""
    if (mismatch := _triton_mismatch()) is not None:
        raise UnsupportedVersionError(mismatch)


@contextmanager
def private_names() -> Iterator[None]:
    """Turns missing or changed private names, and other versions, into UnsupportedVersionError."""
    check()
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        raise UnsupportedVersionError(f"{error}; {way_out()}") from error


#: Folders whose code calls private names with its own arguments, not with a user's.
_CALLERS = tuple(
    f"lorafx.{folder}."
    for folder in (
        *("torch_internals", "capture", "passes", "kernels", "program", "ownership", "model"),
        *("bisection", "weights", "eager"),
    )
)
#: Packages whose private names are called. Modules of torch.nn belong to the model.
_CALLED = ("torch.", "triton.")
_OF_MODELS = "torch.nn."


@contextmanager
def entrance() -> Iterator[None]:
    """Turns errors of the block that another torch has caused into UnsupportedVersionError."""
    try:
        yield
    except Exception as error:
        failure = unsupported(error)
        if failure is None:
            raise
        raise failure from error


def unsupported(raised: BaseException, *, directly: bool = False) -> UnsupportedVersionError | None:
    """The error to raise instead of one that another torch has caused, or None. `directly`: only if
    the called function raised it, not code deep inside of a compiler, which may fail on a graph."""
    may_be = isinstance(raised, (AttributeError, TypeError, ImportError))
    if not may_be or not _is_from_private_name(raised, directly):
        return None
    return UnsupportedVersionError(f"{type(raised).__name__}: {raised}; {way_out()}")


def _is_from_private_name(raised: BaseException, directly: bool) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(raised.__traceback__)]
    for depth, frame in enumerate(reversed(frames)):
        if directly and depth > 1:
            return False
        # The innermost frame outside of torch and triton decides.
        module = f"{frame.f_globals.get('__name__', '')}."
        if module.startswith(_CALLERS):
            return True
        if not module.startswith(_CALLED) or module.startswith(_OF_MODELS):
            return False
    return False
