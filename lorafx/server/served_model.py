"""The one model of a server and its adapters, by the names that requests give them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.cli.serving.model_manager import ModelManager

from lorafx.errors import nearest
from lorafx.server.errors import RequestError
from lorafx.server.settings import Settings
from lorafx.serving.compiled import CompiledModel


class ServedModel(ModelManager):
    """What transformers' server asks for models: here one, that stays. Requests ask for the base by
    `name`, for an adapter by `name:adapter`."""

    def __init__(
        self, compiled: CompiledModel, tokenizer: PreTrainedTokenizerFast, name: str
    ) -> None:
        super().__init__()
        self.get_gen_models: Any = self.listed  # a static method there
        self.compiled = compiled
        self.tokenizer = tokenizer
        self.name = name
        self._created = int(time.time())

    def adapters(self) -> Sequence[str]:
        """The adapters that may be asked for."""
        return self.compiled.adapters

    def has(self, adapter: str) -> bool:
        return adapter in self.compiled.adapters

    def names(self) -> list[str]:
        return [self.name, *(self.name_of(adapter) for adapter in self.adapters())]

    def name_of(self, adapter: str | None) -> str:
        return self.name if adapter is None else f"{self.name}:{adapter}"

    def adapter_of(self, model: object) -> str | None:
        """The adapter that a request asks for by `model`; None is the base model."""
        if not isinstance(model, str) or not model:
            raise RequestError(
                400,
                f"the field `model` says what is to answer: {self.name!r} for the base model, "
                f'"{self.name}:ADAPTER" for an adapter; got {model!r}',
                param="model",
            )
        if model == self.name:
            return None
        adapter = model.removeprefix(f"{self.name}:")
        if adapter != model and self.has(adapter):
            return adapter
        raise RequestError(
            404,
            f"there is no model {model!r}{self._nearest(model)}; the base model is "
            f'{self.name!r}, an adapter "{self.name}:ADAPTER", and GET /v1/models lists all',
            param="model",
            code="model_not_found",
        )

    def _nearest(self, model: str) -> str:
        """What may have been meant: a name as it is, or an adapter's without the base model's, or
        with another one."""
        adapter = model if self.has(model) else model.partition(":")[2] or model
        if self.has(adapter):
            return f"; nearest: {self.name_of(adapter)}"
        return nearest(model, self.names()) or nearest(
            adapter, self.adapters(), prefix=self.name_of("")
        )

    def listed(self) -> list[dict[str, Any]]:
        """The entries of /v1/models."""
        entry = {"object": "model", "created": self._created, "owned_by": "lorafx"}
        base, *adapters = self.names()
        return [
            {"id": base, **entry, "parent": None},
            *({"id": name, **entry, "parent": base} for name in adapters),
        ]

    def shutdown(self) -> None:
        """Nothing: who opened the server closes it."""


class ServedFolder(ServedModel):
    """A model whose adapters are loaded when they are asked for, where they have a folder."""

    def __init__(
        self, settings: Settings, compiled: CompiledModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        super().__init__(compiled, tokenizer, settings.served_name)
        self._settings = settings

    def adapters(self) -> Sequence[str]:
        return self._settings.folders()

    def has(self, adapter: str) -> bool:
        return self._settings.folder_of(adapter) is not None
