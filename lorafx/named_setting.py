"""Settings as messages of errors name them."""

from __future__ import annotations

from typing import NamedTuple


class Setting(NamedTuple):
    """A field of `LoraConfig` or `Options` that a message names, so that a program with options of
    its own can name those.

    Attributes:
        name: the field.
        text: what the message says of it; Python's spelling.
        value: what would do; None where the message does not say.
        given: whether it would do, too, to give the adapter when the model is compiled.
    """

    name: str
    text: str
    value: object = None
    given: bool = False

    @classmethod
    def asked(cls, name: str, value: object, *, given: bool = False) -> Setting:
        """A field of `LoraConfig` that would have to have this value."""
        text = f"compile with LoraConfig({name}={value!r})"
        return cls(name, text + ", or give the adapter when compiling" * given, value, given)

    def __str__(self) -> str:
        return self.text
