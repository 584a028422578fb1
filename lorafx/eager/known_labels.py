"""What is known of operators from earlier calls:

(operator, labels and sizes of tensors, constants)  →  labels of the results
(label and geometry of a storage's tensor, geometry of a view)  →  label of the view
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lorafx.ownership.memory import Geometry
from lorafx.ownership.real_labels import OF_WEIGHTS, SHARED, Listed, Patchy, RealLabel

#: The codes of unknown owners, and of no owner.
UNKNOWN, NOBODYS, WEIGHTS = 0, 1, 2


class KnownLabels:
    """What is known of operators from earlier calls of a program. Labels have numbers, `codes`."""

    def __init__(self, most: int = 1 << 20) -> None:
        #: The most owners in all labels, and sixteen times the most signatures.
        self._most = most
        #: The parameters that were operands, which belong to nobody.
        self.parameters: dict[int, weakref.ref[Tensor]] = {}
        self._clear()

    def _clear(self) -> None:
        self.labels: list[RealLabel | None] = [None, SHARED, OF_WEIGHTS]
        self._codes = {label: code for code, label in enumerate(self.labels)}
        self._owners = 0
        #: The codes of labels with cells, which hold for one call.
        self._patchy: list[int] = []
        #: The codes of results by signature.
        self.results: dict[Any, Sequence[int]] = {}
        #: The signatures of operators whose results depend on the values of indices.
        self.by_values: set[Any] = set()
        #: The codes of views by the label and the geometry of what they are views of, and theirs.
        self.views: dict[tuple[int, Geometry, Geometry], int] = {}

    def begin(self) -> None:
        """Forget the cells of the last call, and everything if it is too much."""
        while self._patchy:
            code = self._patchy.pop()
            self._codes.pop(self.labels[code], None)
            self.labels[code] = None
        many = max(
            map(len, (self.results, self.by_values, self.views, self.labels, self.parameters))
        )
        if max(self._owners, 16 * many) > self._most:
            self._clear()
            self.parameters.clear()

    def code(self, label: RealLabel | None) -> int:
        """The number of this label."""
        if label not in self._codes:
            self._codes[label] = len(self.labels)
            if isinstance(label, Patchy):
                self._patchy.append(len(self.labels))
            elif isinstance(label, Listed):
                self._owners += len(label.owners)
            self.labels.append(label)
        return self._codes[label]
