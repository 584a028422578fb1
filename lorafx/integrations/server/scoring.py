"""Scores of pairs of texts: the cosine of their vectors, or the logit that a head of one label has
for both as one sequence.

/score   text_1, text_2 ───┬▶ pairs ─▶ EncoderBatches ─▶ scores ─┬▶ in the order of the pairs
/rerank  query, documents ─┘                                     └▶ the best first
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from lorafx.integrations.server.encoding import Encoding, Input, Vector
from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.fields import Fields


class PairFields(Fields):
    """Fields of the routes that score, of which the two `named` have the texts."""

    generates: ClassVar = False
    named: ClassVar[tuple[str, str]]

    stream: Literal[False] = False
    use_activation: bool | None = None

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """The texts of both sides: on the first there is one for all, or one for each of the
        second. Raises RequestError for other numbers."""
        asked = [getattr(self, name) for name in self.named]
        first, second = ([side] if isinstance(side, str) else side for side in asked)
        if not second or len(first) not in (1, len(second)):
            one, other = self.named
            raise RequestError(
                f"`{other}` has at least one text, and `{one}` one or as many; got {len(second)} "
                f"and {len(first)}",
                other,
            )
        return first, second

    @property
    def sequences(self) -> int:
        return sum(map(len, self.sides))

    def answer(self, scores: list[float]) -> dict[str, Any]:
        """The fields of an answer with the scores of all pairs."""
        raise NotImplementedError


class ScoreFields(PairFields):
    """Fields of /score."""

    named: ClassVar = ("text_1", "text_2")

    text_1: str | list[str]
    text_2: str | list[str]

    def answer(self, scores: list[float]) -> dict[str, Any]:
        found = [{"index": i, "object": "score", "score": s} for i, s in enumerate(scores)]
        return {"data": found}


class RerankFields(PairFields):
    """Fields of /rerank."""

    named: ClassVar = ("query", "documents")

    query: str
    documents: list[str]
    top_n: int = Field(default=0, ge=0)
    return_documents: bool = True
    max_tokens_per_doc: None = None

    def answer(self, scores: list[float]) -> dict[str, Any]:
        shown = [
            {"document": {"text": text}} if self.return_documents else {} for text in self.documents
        ]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: self.top_n or None]
        return {"results": [{"index": i, "relevance_score": scores[i], **shown[i]} for i in order]}


class Scoring(Encoding):
    """/score."""

    fields: type[Fields] = ScoreFields

    def _read(self, body: Mapping[str, Any]) -> Any:
        labels = self._config.num_labels
        if self._batches.pooling is None and labels != 1:
            raise RequestError(
                f"{self._served.name!r} classifies by {labels} labels, and pairs are scored by "
                "embedding models and by heads of one label; ask /classify"
            )
        return self.fields.read(body)

    def _inputs(self, fields: Any) -> list[Input]:
        first, second = fields.sides
        if self._batches.pooling is not None:
            both = zip(fields.named, (first, second), strict=True)
            return [text for side in both for text in self._sequences(*side, fields)]
        first = first * len(second) if len(first) == 1 else first
        return [self._pair(*texts, fields) for texts in zip(first, second, strict=True)]

    def _pair(self, one: str, other: str, fields: Any) -> Input:
        """The tokens of a pair and their types, if the model has some. What is too long loses the
        last tokens of the second text."""
        special = fields.add_special_tokens is not False
        pair: Any = self._served.tokenizer(one, other, add_special_tokens=special)
        ids, types, most = pair["input_ids"], pair.get("token_type_ids"), self._most(fields)
        if most is not None and len(ids) > most:
            seconds = [i for i, side in enumerate(pair.sequence_ids()) if side == 1]
            left_out = {*seconds[max(0, len(seconds) - len(ids) + most) :]}
            kept = [i for i in range(len(ids)) if i not in left_out]
            ids, types = [ids[i] for i in kept], types and [types[i] for i in kept]
        self._check(ids, fields.named[1])
        return ids, types if self._typed else None

    def _answer(self, head: dict[str, Any], vectors: Sequence[Vector], fields: Any) -> Response:
        rows, (first, _) = torch.stack([vector.numbers for vector in vectors]), fields.sides
        if self._batches.pooling is not None:
            scores = torch.cosine_similarity(rows[: len(first)], rows[len(first) :])
        else:
            scores = (rows if fields.use_activation is False else self._probabilities(rows))[:, 0]
        return JSONResponse(head | fields.answer(scores.tolist()))


class Reranking(Scoring):
    """/rerank."""

    fields = RerankFields


#: The classes of routes by the last part of their paths; the others are `Encoding`.
SCORING = {"score": Scoring, "rerank": Reranking}
