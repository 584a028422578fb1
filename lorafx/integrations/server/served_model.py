"""The one model of a server and its adapters, by the names that requests give them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.cli.serving.model_manager import ModelManager

from lorafx.compiled_model.compiled import CompiledModel
from lorafx.errors import nearest
from lorafx.integrations.server.errors import RequestError
from lorafx.integrations.server.settings import ModelSettings


class ServedModel(ModelManager):
    """What transformers' server asks for models: here one, that stays. Requests ask for the base by
    `name`, for an adapter by `name:adapter`. With `folders` the adapters that have a folder may be
    asked for, which are loaded then; without, those that are loaded."""

    def __init__(
        self,
        compiled: CompiledModel,
        tokenizer: PreTrainedTokenizerFast,
        name: str,
        folders: ModelSettings | None = None,
    ) -> None:
        super().__init__()
        self.get_gen_models: Any = self.listed  # a static method there
        self.compiled = compiled
        self.tokenizer = tokenizer
        self.name = name
        self._folders = folders
        self._created = int(time.time())

    def adapters(self) -> Sequence[str]:
        """The adapters that may be asked for."""
        return self.compiled.adapters if self._folders is None else self._folders.folders()

    def _has(self, adapter: str) -> bool:
        if self._folders is None:
            return adapter in self.compiled.adapters
        return self._folders.folder_of(adapter) is not None

    def adapter_of(self, model: object) -> str | None:
        """The adapter that a request asks for by `model`; None is the base model."""
        if not isinstance(model, str) or not model:
            raise RequestError(
                f"the field `model` says what is to answer: {self.name!r} for the base model, "
                f'"{self.name}:ADAPTER" for an adapter; got {model!r}',
                "model",
            )
        if model == self.name:
            return None
        adapter = model.removeprefix(f"{self.name}:")
        if adapter != model and self._has(adapter):
            return adapter
        raise RequestError(
            f"there is no model {model!r}{self._nearest(model)}; the base model is "
            f'{self.name!r}, an adapter "{self.name}:ADAPTER", and GET /v1/models lists all',
            "model",
            status=404,
            code="model_not_found",
        )

    def _nearest(self, model: str) -> str:
        """What may have been meant: a name as it is, or an adapter's without the base model's, or
        with another one."""
        adapter = model if self._has(model) else model.partition(":")[2] or model
        if self._has(adapter):
            return f"; nearest: {self.name}:{adapter}"
        names = [entry["id"] for entry in self.listed()]
        return nearest(model, names) or nearest(adapter, self.adapters(), prefix=f"{self.name}:")

    def listed(self) -> list[dict[str, Any]]:
        """The entries of /v1/models."""
        entry = {"object": "model", "created": self._created, "owned_by": "lorafx"}
        return [
            {"id": self.name, **entry, "parent": None},
            *({"id": f"{self.name}:{a}", **entry, "parent": self.name} for a in self.adapters()),
        ]
