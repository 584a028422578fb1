"""How much an adapter changes what a module returns, measured by one eager run.

    ‖(y + delta) − y‖ / ‖y‖        y and y + delta on the two sides of the module's mark

The marked model runs with the adapter for all requests, so x is what the adapter's deltas before
this module have made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafx.errors import ConfigError
from lorafx.model.sites import Site
from lorafx.program.roles import RoleTable
from lorafx.session.session import Session

#: Runs a model with an adapter, by its name, for all requests of a call with these arguments.
Serve = Callable[[str, Sequence[Any], Mapping[str, Any]], None]


def change_of(
    serve: Serve, site: Site, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> float | None:
    """The relative norm of what adapter `name` adds to what `site` returns for these arguments;
    None where the model does not call the site's module.

    Raises:
        LorafxError: the adapter cannot be served for such a call.
        Whatever the model raises.
    """
    sums = [0.0, 0.0]
    before: list[Tensor] = []

    def first(module: nn.Module, taken: Any, output: Any) -> None:
        before.append(_tensor(output).detach().clone())

    def last(module: nn.Module, taken: Any, output: Any) -> None:
        y = before.pop().double()
        sums[0] += float((_tensor(output).double() - y).square().sum())
        sums[1] += float(y.square().sum())

    hooks = [
        site.marked.register_forward_hook(first, prepend=True),
        site.marked.register_forward_hook(last),
    ]
    try:
        serve(name, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    if not sums[1]:
        return None
    return (sums[0] / sums[1]) ** 0.5


def in_eager_mode(
    session: Session, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Run the model that `lorafx.compile` serves, as `Serve`."""
    model, row_dims = session.program.model, session.program.config.row_dims
    roles = RoleTable(model, row_dims)
    named = roles.spread(roles.bind(tuple(args), kwargs))
    rows = roles.rows(named)

    def serve() -> None:
        session.set_batch(roles, named)
        with torch.no_grad(), session.module_paths():
            model.forward(*args, **kwargs)

    def run() -> None:
        session.run(session.running.in_forward(session.program.runtime.rows), serve)

    session.call(run, [name] * (1 if rows is None else rows))


def _tensor(output: Any) -> Tensor:
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(value, Tensor):
        raise ConfigError(f"the module returns a {type(output).__name__}, not a tensor")
    return value
