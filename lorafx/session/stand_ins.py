"""Attributes of modules that are replaced while the model runs: compiled forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lorafx.session.session import Session

#: An attribute of a module and what it is while `generate` runs.
Replaced = tuple[nn.Module, str, Callable[..., Any]]
#: The attributes of a module, a name among them, and what it was, None where it was none.
ReplacedAttribute = tuple[dict[str, Any], str, Any]


def put_back(replaced: Sequence[ReplacedAttribute]) -> None:
    """Give modules back what they had, the first that was replaced last."""
    for attributes, name, before in reversed(replaced):
        if before is None:
            attributes.pop(name, None)
        else:
            attributes[name] = before


def replacing(
    session: Session,
    attributes: Sequence[Replaced],
    action: Callable[..., Any],
    *args: Any,
    **kw: Any,
) -> Any:
    """What `action` returns, with these attributes in place of the modules' own."""
    own = [(vars(module), name, vars(module).get(name)) for module, name, _ in attributes]
    outer = session.replaced
    try:
        session.replaced = (*outer, *own)
        for module, name, value in attributes:
            vars(module)[name] = value
        return action(*args, **kw)
    finally:
        try:
            put_back(own)
        except BaseException:  # an interrupt, in the middle of it
            put_back(own)
            raise
        finally:
            session.replaced = outer
