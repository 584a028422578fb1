"""Which prompt each row of a forward inside of `generate` belongs to.

    arguments of `generate`            row b belongs to prompt b, in the dimension of their role
    repeat_interleave, cat, index, …   by the rules of operators (lorafx.eager.following)
    a forward                          its rows are those of its arguments, and so are its results'

A row that the rules do not prove is refused: its number says nothing. transformers' own loops keep
the order of their rows, so what is proved at the beginning of one holds until it ends. Where
nothing but such a loop is left of `generate`, no operator is followed any more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FrameType
from typing import Any, TypeVar

from torch import Tensor

from lorafx.eager.following import Following, counted, unfollowed
from lorafx.eager.known_labels import KnownLabels
from lorafx.errors import BatchError
from lorafx.generation.alora import ActivatedForward
from lorafx.libraries import MIXIN, class_of_library
from lorafx.ownership.labels import One
from lorafx.ownership.memory import Memory
from lorafx.ownership.real_labels import NOBODY, Listed, Shared, listed, same_owners
from lorafx.program.argument_roles import CACHES, PRIMARY, ROW_DIMS, RoleTable, tensor_leaves
from lorafx.program.row_handoff import label_arguments
from lorafx.runtime.entry import Entry
from lorafx.runtime.requests import Requests
from lorafx.runtime.session import Session
from lorafx.torch_internals.transformers_parts import code_of_generate

T = TypeVar("T")
Owners = tuple[int, ...]
Forward = Entry | ActivatedForward


class GeneratedRows:
    """Follows the rows of `count` prompts through one `generate`.

    Args:
        roles: those of the arguments of `generate`.
        remembered: what is known of operators from earlier calls.
        watched: code that is not known may write into memory unseen.
    """

    def __init__(
        self,
        session: Session,
        roles: RoleTable,
        count: int,
        remembered: KnownLabels,
        *,
        watched: bool,
    ) -> None:
        remembered.begin()
        self._session, self._roles, self._count = session, roles, count
        self._memory = Memory(session.program.shared_in_one_call(), lambda: watched)
        self._mode = Following(self._memory, remembered=remembered, watched=watched)
        #: The last loop of transformers, and what was proved of its rows.
        self._loop: FrameType | None = None
        self._owners: Owners = ()
        self._requests = Requests(())
        #: Whether other code calls the model beside a loop.
        self._disturbed = False

    def run(self, generate: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Return the result of `generate`."""
        with counted((args, kwargs)) as (args, kwargs):
            named = self._roles.bind(args, kwargs)
            main = getattr(self._session.program.model, "main_input_name", "inputs")
            named = {
                main if name == "inputs" else name: value
                for name, value in named.items()
                if isinstance(value, (Tensor, Mapping)) or name in ROW_DIMS
            }
            label_arguments(self._memory, self._roles, named, self._count)
            try:
                return self._mode.run(partial(generate, *args, **kwargs))
            finally:
                self._loop = None  # its frame holds what it has computed

    def serve(self, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of a forward, in which each row is a request with its prompt's adapter."""
        return unfollowed(lambda _: self._serve(forward, args, kwargs))

    def _serve(self, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        session, (loop, directly) = self._session, _loop()
        known = loop is not None and loop is self._loop
        if not (self._mode.over and known):
            named = forward.roles.spread(forward.roles.bind(args, kwargs))
            owners = self._proved(forward, named, self._owners if known else None)
            names = session.requests.names
            requests = session.requests._replace(
                names=tuple(names[owner] for owner in owners), owners=owners, serve=None
            )
            if loop is None:  # such as a processor of logits does
                self._disturbed |= self._loop is not None
            else:
                self._loop, self._owners, self._requests = loop, owners, requests
        else:
            requests = self._requests
        running = session.running._replace(requests=requests)
        result = session.note(running, partial(forward, *args, **kwargs))
        if self._mode.over:
            return result
        if known and directly and not self._disturbed and _is_last(loop):
            self._mode.over = True
        else:
            self._label(result, owners)
            self._label({name: named[name] for name in CACHES if name in named}, owners)
        return result

    def _label(self, value: Any, owners: Owners) -> None:
        """Note the owners of the rows of a forward's results, or of the caches that it wrote."""
        items = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, item in items:
            dim = (ROW_DIMS[name] if name in CACHES else 0) or 0
            for tensor in tensor_leaves(item):
                if tensor.dim() > dim and tensor.shape[dim] == len(owners):
                    self._memory.note(tensor, listed(dim, owners))

    def _proved(self, forward: Forward, named: Mapping[str, Any], known: Owners | None) -> Owners:
        """The prompt of each row of a forward with these arguments. `known`: what it is by the loop
        that runs. Raises BatchError where that is not proved."""
        rows = forward.roles.rows(named) or 0
        said: Owners | None = (NOBODY,) * rows
        content, unknown, texts = said, None, []
        for name, shape, owners in self._owners_in(forward.roles, named, rows):
            if owners is None:
                unknown = unknown or (name in _CONTENT and f"{name} {shape}")
                continue
            texts.append(f"{name} {[*owners]}")
            said = said and same_owners((said, owners))
            if name in _CONTENT:
                content = content and same_owners((content, owners))
        if known is not None and len(known) == rows and said is not None:
            said = content = same_owners((said, known))
        if said is None or content is None:
            several = ", ".join(dict.fromkeys(texts))
            why = f"its arguments name different prompts for a row: {several}"
        elif unknown and NOBODY in content:
            why = f"it is not known from which prompts {unknown} was made"
        elif NOBODY in said or not rows:
            why = f"no argument says from which prompt row {[*said, NOBODY].index(NOBODY)} comes"
        else:
            return said
        raise BatchError(
            f"{forward.name} is called with {rows} rows by generate() for {self._count} prompts "
            f"with different adapters, and {why}. Rows are followed from the prompts through "
            "operators of torch, not through lists, numpy or code that it does not see. Call "
            "generate() once for each adapter, or the model itself with a name for each row"
        )

    def _owners_in(
        self, roles: RoleTable, named: Mapping[str, Any], rows: int
    ) -> Iterator[tuple[str, tuple[int, ...], Owners | None]]:
        """The argument, the shape and the owners, if known, of each tensor with an entry a row."""
        for name, value in named.items():
            for tensor in tensor_leaves(value):
                role = roles.role(name, tensor, named)
                dim = role.dim if role.known else None
                if dim is None or tensor.dim() <= dim or tensor.shape[dim] != rows:
                    continue
                label, owners = self._memory.look(tensor), None
                if isinstance(label, Listed) and label.dim == dim:
                    owners = label.owners
                elif isinstance(label, (One, Shared)):
                    owners = (label.request if isinstance(label, One) else NOBODY,) * rows
                yield name, tuple(tensor.shape), owners


#: Arguments with what a row is. Others, such as masks, may be the same for rows of several prompts.
_CONTENT = (*PRIMARY, *CACHES, "encoder_outputs", "encoder_hidden_states")
#: Modules whose functions stand between a loop and a compiled forward.
_BETWEEN = ("lorafx", "torch.nn.modules.module")


def _code(part: str) -> frozenset[CodeType]:
    return code_of_generate(class_of_library(*MIXIN), part)


def _loop() -> tuple[FrameType | None, bool]:
    """The loop of transformers that calls the forward, and whether it does so by itself: it does
    not at its first one, for the prompts. No loop if other code calls it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _module(frame).startswith(_BETWEEN):
        frame = frame.f_back
    caller = frame
    while frame is not None and frame.f_code in _code("prompts"):
        frame = frame.f_back
    if frame is None or frame.f_code not in _code("loops"):
        return None, False
    return frame, frame is caller


def _is_last(loop: FrameType | None) -> bool:
    """Whether nothing is left but the loop: transformers' `generate` returns what it returns."""
    frame = None if loop is None else loop.f_back
    while frame is not None and frame.f_code in _code("generate"):
        frame = frame.f_back
    while frame is not None and _module(frame).startswith("lorafx"):
        if frame.f_code is GeneratedRows.run.__code__:
            return True
        frame = frame.f_back
    return False


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))
