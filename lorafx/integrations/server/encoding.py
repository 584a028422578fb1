"""Encoders: a vector for each input, computed in batches that requests of all adapters share.

/v1/embeddings, /pooling, /classify ── tokens, adapter ─▶ EncoderBatches ─▶ a call of the model
                                    ◀── vector ── Pooling ◀── states of tokens ───┘
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import cached_file

from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import ConfigError, LorafxError
from lorafx.generation.continuous.adapter_requests import weights_now
from lorafx.generation.continuous.failures import StepHealth
from lorafx.integrations.server.answers import versions_of
from lorafx.integrations.server.choices import Prompt
from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.fields import Fields, prompts_in
from lorafx.integrations.server.generating import ServedModel
from lorafx.integrations.server.handlers import prompts_of
from lorafx.integrations.server.request_log import current_record
from lorafx.integrations.server.settings import ModelSettings

#: sentence-transformers' names for how a vector is made of the states of tokens.
_POOLINGS = {"mean": "mean", "cls": "cls", "last": "lasttoken", "max": "max"}
#: The activation of a CrossEncoder that scores by logits.
_IDENTITY = "torch.nn.modules.linear.Identity"
#: The most tokens of a call, padding included, unless the settings say otherwise.
_MOST_TOKENS = 4096


def saved_json(model: str, file: str) -> Any:
    """A JSON file beside a model; None if it has none."""
    path = cached_file(model, file, _raise_exceptions_for_missing_entries=False)
    return None if path is None else json.loads(Path(path).read_text())


class Pooling(NamedTuple):
    """Makes a vector of the states of a sequence's tokens: their mean, the first, the last, or the
    largest number of each column. `normalised`: vectors have the length 1 unless requests say
    otherwise."""

    mode: str
    normalised: bool = True

    @classmethod
    def of(cls, settings: ModelSettings, causal: bool) -> Pooling:
        """What the settings say, or else sentence-transformers' files beside the model. Without any
        it is the mean, and the last token if a model is `causal`, since only that has seen all.
        Raises ConfigError for what is not served."""
        mode, normalised = "lasttoken" if causal else "mean", True
        for module in saved_json(settings.model, "modules.json") or ():
            kind = module["type"].rpartition(".")[2]
            if kind == "Pooling":
                mode = _saved_mode(saved_json(settings.model, f"{module['path']}/config.json"))
            elif kind not in ("Transformer", "Normalize"):
                raise ConfigError(f"{settings.model}: its module {module['type']} is not served")
            normalised = kind == "Normalize"
        mode = _POOLINGS[settings.pooling] if settings.pooling else mode
        if mode not in _POOLINGS.values():
            ways = ", ".join(_POOLINGS)
            raise ConfigError(
                f"{settings.model} pools by {mode}; choose one of {ways} by --pooling"
            )
        return cls(mode, normalised)

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """(rows, features) of `states` (rows, tokens, features), which are padded on the right."""
        if self.mode == "cls":
            return states[:, 0]
        if self.mode == "lasttoken":
            return states[torch.arange(len(states)), mask.sum(1) - 1]
        kept = mask.unsqueeze(-1)
        if self.mode == "max":
            return states.masked_fill(kept == 0, float("-inf")).amax(1)
        return (states * kept).sum(1) / kept.sum(1)


def _saved_mode(config: Mapping[str, Any]) -> str:
    """The mode of a Pooling module, of which older files have a switch for each."""
    prefix, mode = "pooling_mode_", config.get("pooling_mode")
    on = [key.removeprefix(prefix) for key in config if key.startswith(prefix) and config[key]]
    names = [mode] if isinstance(mode, str) else mode or on
    return "+".join(name.removesuffix("_tokens").removesuffix("_token") for name in names)


class Vector(NamedTuple):
    """The vector of a sequence, and what it was computed with, as in outputs of the engine."""

    numbers: Tensor
    adapter_version: int | None
    weights_version: int


#: The tokens of a sequence, and their token_type_ids if it is a pair and has some.
Input = tuple[list[int], list[int] | None]


class _Row(NamedTuple):
    """A sequence that waits for a call."""

    tokens: list[int]
    adapter: str | None
    result: asyncio.Future[Vector]
    types: list[int] | None = None


class EncoderBatches:
    """Calls an encoder for sequences of all adapters; has what `Metrics` and `Control` ask of an
    engine. A sequence that comes while nothing runs waits for company; those that come during a
    call share the next ones.

    A call has the sequence that waits longest and those nearest to it in length: as many as fit
    into a number of tokens with their padding, which is at most half of them.
    """

    def __init__(
        self, compiled: CompiledModel, pooling: Pooling | None, settings: ModelSettings, pad: int
    ) -> None:
        """`pooling` is None for a model that answers with logits."""
        self.forwards, self.health = compiled._entries, StepHealth()
        self.pooling = pooling
        self._compiled, self._pad = compiled, pad
        self._most = settings.max_batch_tokens or _MOST_TOKENS
        self._window = settings.batch_window / 1000
        self._waiting: list[_Row] = []
        self._calling: asyncio.Task[None] | None = None

    async def vectors(self, inputs: Sequence[Input], adapter: str | None) -> list[Vector]:
        """The vector of each sequence. Raises RequestError if the model fails, and what a call of
        it raises of lorafx's errors."""
        loop = asyncio.get_running_loop()
        rows = [_Row(tokens, adapter, loop.create_future(), types) for tokens, types in inputs]
        self._waiting += rows
        if self._calling is None or self._calling.done():
            self._calling = asyncio.create_task(self._call())
        return await asyncio.gather(*(row.result for row in rows))

    async def _call(self) -> None:
        if sum(len(row.tokens) for row in self._waiting) < self._most:
            await asyncio.sleep(self._window)
        while rows := self._next():
            await self._answer(rows)

    def _next(self) -> list[_Row]:
        """The rows of the next call, which wait no more."""
        waiting = [row for row in self._waiting if not row.result.done()]  # clients may have left
        chosen: list[_Row] = []
        tokens = longest = 0
        for row in sorted(waiting, key=lambda row: abs(len(row.tokens) - len(waiting[0].tokens))):
            tokens, longest = tokens + len(row.tokens), max(longest, len(row.tokens))
            if chosen and longest * (len(chosen) + 1) > min(self._most, 2 * tokens):
                break
            chosen.append(row)
        taken = set(map(id, chosen))
        self._waiting = [row for row in waiting if id(row) not in taken]
        return chosen

    async def _answer(self, rows: Sequence[_Row]) -> None:
        try:
            vectors = await asyncio.to_thread(self._compute, rows)
        except Exception as error:
            if len(rows) > 1:  # one that fails, or whose adapter is not there any more, fails alone
                rows = sorted(rows, key=lambda row: row.adapter or "")
                for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                    await self._answer(part)
                return
            known = isinstance(error, LorafxError)
            failure = error if known else RequestError(f"the model failed: {error}", status=500)
            if not rows[0].result.done():
                rows[0].result.set_exception(failure)
        else:
            for row, vector in zip(rows, vectors, strict=True):
                if not row.result.done():
                    row.result.set_result(vector)

    @torch.no_grad()
    def _compute(self, rows: Sequence[_Row]) -> list[Vector]:
        tokens = [torch.tensor(row.tokens) for row in rows]
        ids = pad_sequence(tokens, batch_first=True, padding_value=self._pad)
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        model: Any = self._compiled._orig_mod
        ids, mask = ids.to(model.device), mask.to(model.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if any(row.types for row in rows):
            types = [torch.tensor(row.types or [0] * len(row.tokens)) for row in rows]
            inputs["token_type_ids"] = pad_sequence(types, batch_first=True).to(model.device)
        names = [row.adapter for row in rows]
        served = None
        while served != (served := self._versions()):  # again if they changed meanwhile
            output = self._compiled(**inputs, adapter_names=names)
        adapters, weights = served
        pool = self.pooling
        pooled = output.logits if pool is None else pool(output.last_hidden_state, mask)
        return [
            Vector(numbers, adapters.get(name or ""), weights >> 1)
            for numbers, name in zip(pooled.float().cpu(), names, strict=True)
        ]

    def _versions(self) -> tuple[dict[str, int], int]:
        return self._compiled.adapter_versions, weights_now(self.forwards.session)

    # --- as an engine ---

    @property
    def busy(self) -> bool:
        """Whether sequences wait or are computed."""
        return self._calling is not None and not self._calling.done()

    def drain(self, *, abort: bool = False) -> None:
        """Return when all sequences have been computed, also with `abort`: it is one call each."""
        while self.busy:
            time.sleep(0.001)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing is computed in the block if nothing comes."""
        self.drain()
        yield

    def reset_pages(self) -> bool:
        """There are none."""
        return True

    def unhealthy(self) -> str | None:
        """As the model's."""
        try:
            self.forwards.check_attached()
        except LorafxError as error:
            return str(error)
        return None

    def sequences(self) -> dict[str, list[Any]]:
        """Those of an engine: none."""
        return {"running": [], "waiting": []}

    def cache_usage(self) -> float:
        """There is no cache."""
        return 0.0


class EncodingFields(Fields):
    """Fields of /v1/embeddings, /pooling and /classify."""

    generates: ClassVar = False

    input: Any
    stream: Literal[False] = False
    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: Literal["float32"] = "float32"
    endianness: Literal["native", "little"] = "native"
    use_activation: bool | None = None
    dimensions: None = None
    task: Literal["embed", "classify"] | None = None

    @property
    def sequences(self) -> int:
        return prompts_in(self.input)


class Encoding:
    """Answers the requests of one of the routes `ENCODING`, which have these `fields`."""

    fields: type[Fields] = EncodingFields

    def __init__(self, served: ServedModel, path: str) -> None:
        self._served, self._path = served, path
        self._batches: EncoderBatches = served.engine
        model: Any = served.compiled._orig_mod
        self._config = model.config
        self._typed = "token_type_ids" in inspect.signature(model.forward).parameters

    def _read(self, body: Mapping[str, Any]) -> Any:
        """The fields of a request. Raises RequestError if the model has no such answers."""
        fields: Any = self.fields.read(body)
        task, way = "embed", "/v1/embeddings"
        if self._batches.pooling is None:
            task, way = "classify", "/classify"
        if self._path not in (way, "/pooling") or fields.task not in (None, task):
            name = self._served.name
            raise RequestError(f"{name!r} has no vectors for that; ask {way} or /pooling")
        return fields

    async def handle(self, request: Request, body: dict) -> Response:
        """Answer a request. Raises RequestError if it is refused."""
        served, record = self._served, current_record()
        adapter = await served.resolve(body)
        record.asks_for(adapter)
        fields = self._read(body)
        served.queue.take(fields.sequences, had=1)
        inputs = await asyncio.to_thread(self._inputs, fields)
        record.prompt_tokens = sum(len(tokens) for tokens, _ in inputs)
        await served.control.admitted()
        vectors = await self._batches.vectors(inputs, adapter)
        usage = {"prompt_tokens": record.prompt_tokens, "total_tokens": record.prompt_tokens}
        head = {"id": request.state.request_id, "object": "list", "created": int(time.time())}
        oldest = min(vectors, key=lambda v: (v.weights_version, v.adapter_version or 0))
        head |= {"model": body["model"], "usage": usage, **versions_of(oldest)}
        return await asyncio.to_thread(self._answer, head, vectors, fields)

    def _inputs(self, fields: Any) -> list[Input]:
        """What the model computes a vector of, each. Raises as `_sequences`."""
        return self._sequences("input", fields.input, fields)

    def _most(self, fields: Fields) -> int | None:
        """To how many tokens a sequence is cut, if it is."""
        cut = fields.truncate_prompt_tokens
        return self._served.most_tokens if cut == -1 else cut

    def _sequences(self, field: str, asked: Any, fields: Fields) -> list[Input]:
        """The tokens of each input of a field. Raises RequestError if it has none, or too many."""
        cut, special = self._most(fields), fields.add_special_tokens
        prompts = prompts_of(self._served, field, asked, special)
        sequences = [
            prompt.ids if cut is None else self._cut(prompt, cut, special is not False)
            for prompt in prompts
        ]
        for tokens in sequences:
            self._check(tokens, field)
        return [(tokens, None) for tokens in sequences]

    def _check(self, tokens: Sequence[int], field: str) -> None:
        most = self._served.most_tokens
        if not tokens:
            raise RequestError("an input is empty: it has no tokens; leave it out", field)
        if len(tokens) > most:
            raise RequestError(
                f"an input has {len(tokens)} tokens, and may have {most}; shorten it, or send "
                "`truncate_prompt_tokens` -1",
                field,
            )

    def _cut(self, prompt: Prompt, most: int, special: bool) -> list[int]:
        """At most as many tokens of a prompt. As tokenizers cut a text, it keeps the `special`
        tokens at its end, of which some models pool the last."""
        ids, ends = prompt.ids, 0
        if len(ids) <= most:
            return ids
        if prompt.text is not None:
            encoded: Any = self._served.tokenizer(
                prompt.text, add_special_tokens=special, return_special_tokens_mask=True
            )
            ends = min(most, [*reversed(encoded["special_tokens_mask"]), 0].index(0))
        return ids[: most - ends] + ids[len(ids) - ends :]

    def _answer(self, head: dict[str, Any], vectors: Sequence[Vector], fields: Any) -> Response:
        pooling, asked = self._batches.pooling, fields.use_activation
        rows = torch.stack([vector.numbers for vector in vectors])
        if pooling is None:
            rows = self._probabilities(rows) if asked is not False else rows
        elif pooling.normalised if asked is None else asked:
            rows = torch.nn.functional.normalize(rows)
        entries = [{"index": i, **self._entry(row, fields)} for i, row in enumerate(rows)]
        return JSONResponse({**head, "data": entries})

    def _probabilities(self, logits: Tensor) -> Tensor:
        kind = getattr(self._config, "problem_type", None)
        saved = getattr(self._config, "sentence_transformers", None) or {}  # by a CrossEncoder
        if kind == "regression" or saved.get("activation_fn") == _IDENTITY:
            return logits
        if kind == "multi_label_classification" or logits.shape[1] == 1:
            return logits.sigmoid()
        return logits.softmax(-1)

    def _entry(self, row: Tensor, fields: EncodingFields) -> dict[str, Any]:
        if self._path == "/classify":
            label = self._config.id2label.get(int(row.argmax()))
            return {"label": label, "probs": row.tolist(), "num_classes": len(row)}
        numbers: Any = row.tolist()
        if fields.encoding_format == "base64":
            numbers = base64.b64encode(row.numpy().tobytes()).decode()
        if self._path == "/pooling":
            return {"object": "pooling", "data": numbers}
        return {"object": "embedding", "embedding": numbers}
